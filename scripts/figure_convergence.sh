#!/usr/bin/env bash
# The convergence figure of the paper: test error against epochs of WRN-16-1 alone, with attention transfer (AT) and with full-activation
# transfer (F-ActT) from WRN-16-2, on CIFAR-10. Ends with a table of means over the figure's ranges of epochs, and a picture for each seed.
#
#   bash scripts/figure_convergence.sh
#
# Environment: see common.sh. The nets in logs/epochs$EPOCHS are shared with the tables of CIFAR-10.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS-0}
EPOCHS=${EPOCHS:-200}
LOGS=${LOGS:-logs/epochs$EPOCHS}

run_list <<'RUNS'
cifar = cifar.py --dataset CIFAR10 --epochs $EPOCHS
student = $cifar --depth 16 --width 1

wrn_16_2_seed$s | - | - | $cifar --depth 16 --width 2 --seed $s
wrn_16_1_seed$s | - | 8.77 | $student --seed $s

wait

== last epoch | wrn_16_1 | -
at_wrn_16_1_from_wrn_16_2_seed$s | AT | 7.93 | $student --teacher_id $LOGS/wrn_16_2_seed$s --beta 1e+3 --seed $s
factt_wrn_16_1_from_wrn_16_2_seed$s | F-ActT | 8.51 | $student --teacher_id $LOGS/wrn_16_2_seed$s --method factt --beta $FACTT_BETA --beta_decay linear --seed $s

summarize convergence
curves $LOGS/convergence_seed$s.svg
RUNS
