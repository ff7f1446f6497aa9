#!/usr/bin/env bash
# How the weight of attention transfer, --beta, acts: AT and AT + KD from WRN-16-2 to WRN-16-1 on CIFAR-10 for many values of it, tested on training
# images that no net here was trained on. Ends with a table and a picture, LOGS/beta.svg.
#
#   bash scripts/beta.sh
#   BETAS="100 1000" EPOCHS=30 bash scripts/beta.sh
#
# Environment: BETAS, VALIDATE=5000, the number of those images; else as common.sh, with LOGS=logs/beta_epochs$EPOCHS.
# shellcheck disable=SC2086  # seeds are numbers
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS:-0}
EPOCHS=${EPOCHS:-200}
LOGS=${LOGS:-logs/beta_epochs$EPOCHS}
BETAS=${BETAS:-10 31.6 100 316 1000 3160 10000 31600 100000}
find_cifar CIFAR10
recipe=(--epochs "$EPOCHS" --validate "${VALIDATE:-5000}")

for s in $SEEDS; do
  cifar wrn_16_2_seed$s --depth 16 --width 2 --seed $s
  cifar wrn_16_1_seed$s --depth 16 --width 1 --seed $s
done
wait_for_all
for s in $SEEDS; do
  teacher=$LOGS/wrn_16_2_seed$s
  cifar kd_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --alpha 0.9 --seed $s
  for beta in $BETAS; do
    cifar at_beta${beta}_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --beta $beta --seed $s
    cifar at_kd_beta${beta}_wrn_16_1_from_wrn_16_2_seed$s --depth 16 --width 1 --teacher_id "$teacher" --alpha 0.9 --beta $beta --beta_decay linear --seed $s
  done
done
wait_for_all
summarize beta "$LOGS/beta.svg" --betas $BETAS
