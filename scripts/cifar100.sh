#!/usr/bin/env bash
# CIFAR-100, not in the paper: WRN-40-2 teaches WRN-16-2 and WRN-40-1, on the schedule of RepDistiller, whose table the field compares with.
#
#   bash scripts/cifar100.sh
#
# Near, but not like for like: there the border is zeros where ours is reflected, images are normalised with CIFAR-100's own mean and deviation,
# batch norm weights start at 1, and momentum is kept where the rate drops; its numbers are means of 5 runs.
# Environment: see common.sh; LOGS=logs/cifar100_epochs$EPOCHS. Ends with the table, in accuracy.
# shellcheck disable=SC2086  # seeds are numbers
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS:-0 1 2 3 4}
EPOCHS=${EPOCHS:-240}
LOGS=${LOGS:-logs/cifar100_epochs$EPOCHS}
find_cifar CIFAR100

# The rate drops after epochs 150, 180 and 210 of 240; of other EPOCHS each rate keeps its share.
drops='' last=0
for after in 150 180 210; do
  drop=$(((after * EPOCHS + 120) / 240 + 1))
  [ $drop = $last ] || drops=$drops,$drop
  last=$drop
done
recipe=(--epochs "$EPOCHS" --batch_size 64 --lr 0.05 --lr_decay_ratio 0.1 --epoch_step "[${drops#,}]")

for s in $SEEDS; do
  cifar wrn_40_2_seed$s --depth 40 --width 2 --seed $s
  cifar wrn_16_2_seed$s --depth 16 --width 2 --seed $s
  cifar wrn_40_1_seed$s --depth 40 --width 1 --seed $s
done
wait_for_all
for s in $SEEDS; do
  teacher=$LOGS/wrn_40_2_seed$s
  cifar kd_wrn_16_2_from_wrn_40_2_seed$s --depth 16 --width 2 --teacher_id "$teacher" --temperature 4 --alpha 0.9 --seed $s
  cifar at_wrn_16_2_from_wrn_40_2_seed$s --depth 16 --width 2 --teacher_id "$teacher" --beta 1e+3 --seed $s
  cifar kd_wrn_40_1_from_wrn_40_2_seed$s --depth 40 --width 1 --teacher_id "$teacher" --temperature 4 --alpha 0.9 --seed $s
  cifar at_wrn_40_1_from_wrn_40_2_seed$s --depth 40 --width 1 --teacher_id "$teacher" --beta 1e+3 --seed $s
done
wait_for_all
summarize cifar100
