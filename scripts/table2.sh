#!/usr/bin/env bash
# Table 2 of the paper: mapping functions, from WRN-16-2 to WRN-16-1 on CIFAR-10, medians of 5 seeds. Also the transfer of a single group,
# from the text beside Table 1.
#
#   bash scripts/table2.sh
#
# Environment: see common.sh. The nets in logs/epochs$EPOCHS are shared with the other tables of CIFAR-10. Ends with the table.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS-0 1 2 3 4}
EPOCHS=${EPOCHS:-200}
LOGS=${LOGS:-logs/epochs$EPOCHS}

run_list <<'RUNS'
cifar = cifar.py --dataset CIFAR10 --epochs $EPOCHS
at = $cifar --depth 16 --width 1 --teacher_id $LOGS/wrn_16_2_seed$s --beta 1e+3

wrn_16_2_seed$s | - | - | $cifar --depth 16 --width 2 --seed $s
wrn_16_1_seed$s | - | 8.77 | $cifar --depth 16 --width 1 --seed $s

wait

== WRN-16-1 from WRN-16-2, by map | wrn_16_1 | -
at_p1_wrn_16_1_from_wrn_16_2_seed$s | sum |A| | 7.99 | $at --at_p 1 --seed $s
at_wrn_16_1_from_wrn_16_2_seed$s | sum |A|^2 | 7.93 | $at --seed $s
at_p4_wrn_16_1_from_wrn_16_2_seed$s | sum |A|^4 | 8.09 | $at --at_p 4 --seed $s
at_max_wrn_16_1_from_wrn_16_2_seed$s | max |A| | 8.08 | $at --at_map max --at_p 1 --seed $s

== WRN-16-1 from WRN-16-2, sum |A|^2 of one group (of all three: above) | wrn_16_1 | -
at_group0_wrn_16_1_from_wrn_16_2_seed$s | first group | 8.11 | $at --at_groups 0 --seed $s
at_group1_wrn_16_1_from_wrn_16_2_seed$s | second group | 7.96 | $at --at_groups 1 --seed $s
at_group2_wrn_16_1_from_wrn_16_2_seed$s | third group | 7.97 | $at --at_groups 2 --seed $s

summarize table2
RUNS
