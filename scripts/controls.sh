#!/usr/bin/env bash
# How much of the gain is due to the teacher? Not in the paper. WRN-16-1 on CIFAR-10, trained
#   alone; with attention transfer (AT) from WRN-16-2, from an untrained WRN-16-2, and from a WRN-16-1; and alone for as many seconds as AT takes.
#
#   bash scripts/controls.sh
#
# The last length is EPOCHS times the ratio of the measured times of an epoch with and without AT. It is wrong if the machine was busier in one of
# them. It is kept in LOGS/equal_time_to_EPOCHS for later starts, and can be written there by hand.
# Environment: see common.sh. The nets in logs/epochs$EPOCHS are shared with the tables of CIFAR-10. Ends with the table.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS-0 1 2 3 4}
EPOCHS=${EPOCHS:-200}
LOGS=${LOGS:-logs/epochs$EPOCHS}

# Each WRN-16-1 learns from the WRN-16-1 of the next seed, which saw the images in another order.
run_list <<'RUNS'
cifar = cifar.py --dataset CIFAR10
student = $cifar --epochs $EPOCHS --depth 16 --width 1

wrn_16_2_seed$s | - | - | $cifar --epochs $EPOCHS --depth 16 --width 2 --seed $s
untrained_wrn_16_2_seed$s | - | - | $cifar --epochs 0 --depth 16 --width 2 --seed $s
wrn_16_1_seed$s | - | 8.77 | $student --seed $s

wait

== WRN-16-1 | wrn_16_1 | -
at_wrn_16_1_from_wrn_16_2_seed$s | AT from WRN-16-2 | 7.93 | $student --teacher_id $LOGS/wrn_16_2_seed$s --beta 1e+3 --seed $s
at_wrn_16_1_from_untrained_wrn_16_2_seed$s | AT from an untrained WRN-16-2 | - | $student --teacher_id $LOGS/untrained_wrn_16_2_seed$s --beta 1e+3 --seed $s
at_wrn_16_1_from_wrn_16_1_seed$s | AT from another WRN-16-1 | - | $student --teacher_id $LOGS/wrn_16_1_seed$next --beta 1e+3 --seed $s

wait

wrn_16_1_equal_time_seed$s | alone, for as long as with AT | - | $cifar --epochs $equal_time --depth 16 --width 1 --seed $s

summarize controls
RUNS
