#!/usr/bin/env bash
# Table 2 of the paper: which map is transferred, from WRN-16-2 to WRN-16-1 on CIFAR-10, medians of 5 seeds; and, from the text beside
# Table 1, the maps of one group alone.
#
#   bash scripts/table2.sh
#
# Environment: see common.sh. The nets in logs/epochs$EPOCHS are shared with the other tables of CIFAR-10. Ends with the table.
# shellcheck disable=SC2086  # seeds are numbers
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS:-0 1 2 3 4}
EPOCHS=${EPOCHS:-200}
LOGS=${LOGS:-logs/epochs$EPOCHS}
find_cifar CIFAR10
recipe=(--epochs "$EPOCHS")

for s in $SEEDS; do
  cifar wrn_16_2_seed$s --depth 16 --width 2 --seed $s
  cifar wrn_16_1_seed$s --depth 16 --width 1 --seed $s
done
wait_for_all

for s in $SEEDS; do
  teacher=$LOGS/wrn_16_2_seed$s
  cifar at_p1_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --at_p 1 --seed $s
  cifar at_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --seed $s
  cifar at_p4_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --at_p 4 --seed $s
  cifar at_max_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --at_map max --at_p 1 --seed $s
  cifar at_group0_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --at_groups 0 --seed $s
  cifar at_group1_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --at_groups 1 --seed $s
  cifar at_group2_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --at_groups 2 --seed $s
done
wait_for_all
summarize table2
