#!/usr/bin/env bash
# The convergence figure of the paper: test error against epochs of WRN-16-1 alone, with attention transfer (AT) and with full-activation
# transfer (F-ActT) from WRN-16-2, on CIFAR-10. Ends with a table of means over the figure's stretches of epochs, and a picture for each seed.
#
#   bash scripts/figure_convergence.sh
#
# Environment: see common.sh. The nets in logs/epochs$EPOCHS are shared with the tables of CIFAR-10.
# shellcheck disable=SC2086  # seeds are numbers
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS:-0}
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
  cifar at_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta 1e+3 --seed $s
  cifar factt_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --method factt --beta $FACTT_BETA --beta_decay linear --seed $s
done
wait_for_all
summarize convergence
for s in $SEEDS; do
  curves=() labels=()
  for curve in student:wrn_16_1 AT:at_wrn_16_1_from_wrn_16_2 F-ActT:factt_wrn_16_1_from_wrn_16_2; do
    folder=$LOGS/${curve#*:}_seed$s
    [ -n "${DRY_RUN:-}" ] || [ -s "$folder/log.txt" ] || continue # with ONLY not all are there
    curves+=("$folder") labels+=("${curve%%:*}")
  done
  [ ${#curves[@]} = 0 ] || tool scripts/plot.py --paper_figure "${curves[@]}" --labels "${labels[@]}" --save "$LOGS/convergence_seed$s.svg"
done
