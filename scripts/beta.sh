#!/usr/bin/env bash
# Error against --beta: AT and AT + KD from WRN-16-2 to WRN-16-1 on CIFAR-10, tested on held-out training images that neither net has seen.
# Ends with a table and a picture, LOGS/beta.svg.
#
#   bash scripts/beta.sh
#   BETAS="100 1000" EPOCHS=30 bash scripts/beta.sh
#
# Environment: BETAS, VALIDATE=5000 (held-out images), LOGS=logs/beta_epochs$EPOCHS; the rest as in common.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS-0}
EPOCHS=${EPOCHS:-200}
LOGS=${LOGS:-logs/beta_epochs$EPOCHS}
export BETAS=${BETAS:-10 31.6 100 316 1000 3160 10000 31600 100000} VALIDATE=${VALIDATE:-5000}

run_list <<'RUNS'
cifar = cifar.py --dataset CIFAR10 --epochs $EPOCHS --validate $VALIDATE
student = $cifar --depth 16 --width 1

wrn_16_2_seed$s | - | - | $cifar --depth 16 --width 2 --seed $s
wrn_16_1_seed$s | - | - | $student --seed $s

wait

== WRN-16-1 from WRN-16-2, held-out training images | wrn_16_1 | wrn_16_2
kd_wrn_16_1_from_wrn_16_2_seed$s | KD | - | $student --teacher_id $LOGS/wrn_16_2_seed$s --alpha 0.9 --seed $s
at_beta${BETA}_wrn_16_1_from_wrn_16_2_seed$s | AT | - | $student --teacher_id $LOGS/wrn_16_2_seed$s --beta $BETA --seed $s
at_kd_beta${BETA}_wrn_16_1_from_wrn_16_2_seed$s | AT + KD | - | $student --teacher_id $LOGS/wrn_16_2_seed$s --alpha 0.9 --beta $BETA --beta_decay linear --seed $s

summarize beta $LOGS/beta.svg --betas $BETAS
RUNS
