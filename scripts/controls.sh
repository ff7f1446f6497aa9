#!/usr/bin/env bash
# What of the gain is due to the teacher? Not in the paper. WRN-16-1 on CIFAR-10 alone and with attention transfer (AT) from WRN-16-2, beside
#   AT from an untrained WRN-16-2; AT from a trained WRN-16-1, which is no better than the student; and the student alone, trained for as long a time as with AT.
#
#   bash scripts/controls.sh
#
# The length of the last is EPOCHS times the ratio of the measured times of an epoch with AT and without. It is kept in LOGS/equal_time_to_EPOCHS,
# so that later starts use the same; a machine that was busier in one of the two misleads it.
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
