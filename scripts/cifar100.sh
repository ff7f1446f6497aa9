#!/usr/bin/env bash
# CIFAR-100, not in the paper: WRN-40-2 teaches WRN-16-2 and WRN-40-1, with the schedule of RepDistiller, a common reference.
#
#   bash scripts/cifar100.sh
#
# The comparison is not exact. RepDistiller pads with zeros (here: reflection), normalises with CIFAR-100's own mean and std (here: CIFAR-10's),
# starts batch norm weights at 1 (here: uniform in 0 to 1), and keeps momentum when the rate drops. Its numbers are means of 5 runs.
# Environment: see common.sh; LOGS=logs/cifar100_epochs$EPOCHS. Ends with the table, in accuracy.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS-0 1 2 3 4}
EPOCHS=${EPOCHS:-240}
LOGS=${LOGS:-logs/cifar100_epochs$EPOCHS}

# The rate drops after epochs 150, 180 and 210 of 240; with other EPOCHS, each rate keeps its share.
DROPS='' last=0
for after in 150 180 210; do
  drop=$(((after * EPOCHS + 120) / 240 + 1))
  [ $drop = $last ] || DROPS=$DROPS,$drop
  last=$drop
done
export DROPS=${DROPS#,}

run_list <<'RUNS'
cifar = cifar.py --dataset CIFAR100 --epochs $EPOCHS --batch_size 64 --lr 0.05 --lr_decay_ratio 0.1 --epoch_step [$DROPS]
kd = --teacher_id $LOGS/wrn_40_2_seed$s --temperature 4 --alpha 0.9
at = --teacher_id $LOGS/wrn_40_2_seed$s --beta 1e+3

wrn_40_2_seed$s | - | 75.61 | $cifar --depth 40 --width 2 --seed $s
wrn_16_2_seed$s | - | 73.26 | $cifar --depth 16 --width 2 --seed $s
wrn_40_1_seed$s | - | 71.98 | $cifar --depth 40 --width 1 --seed $s

wait

== WRN-16-2 from WRN-40-2 | wrn_16_2 | wrn_40_2
kd_wrn_16_2_from_wrn_40_2_seed$s | KD | 74.92 | $cifar --depth 16 --width 2 $kd --seed $s
at_wrn_16_2_from_wrn_40_2_seed$s | AT | 74.08 | $cifar --depth 16 --width 2 $at --seed $s

== WRN-40-1 from WRN-40-2 | wrn_40_1 | wrn_40_2
kd_wrn_40_1_from_wrn_40_2_seed$s | KD | 73.54 | $cifar --depth 40 --width 1 $kd --seed $s
at_wrn_40_1_from_wrn_40_2_seed$s | AT | 72.77 | $cifar --depth 40 --width 1 $at --seed $s

summarize cifar100
RUNS
