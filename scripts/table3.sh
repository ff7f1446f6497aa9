#!/usr/bin/env bash
# Table 3 of the paper: gradient-based attention, on CIFAR-10. The student is a thin NIN without batch norm, trained on flips alone and
# without weight decay, with one fixed seed.
#
#   bash scripts/table3.sh
#
# Environment: see common.sh. The nets in logs/epochs$EPOCHS are shared with the other tables of CIFAR-10. Ends with the table.
# shellcheck disable=SC2086  # seeds are numbers
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS:-0}
EPOCHS=${EPOCHS:-200} # not stated in the paper; as in its other tables
LOGS=${LOGS:-logs/epochs$EPOCHS}
# None is stated in the paper, and none has been tried against others yet: try them with EXTRA="--validate 5000" in another LOGS.
LR=0.01
MINL2_BETA=1 SYM_BETA=1 GRAD_BETA=1
find_cifar CIFAR10
recipe=(--epochs "$EPOCHS")

# The wide NIN of Table 1 teaches; that of AT has no batch norm and ReLU before pooling, where the student has none, so that maps are of
# the outputs of convolutions. How the teachers are trained is not stated: here as in Table 1.
for s in $SEEDS; do
  cifar nin_192_seed$s --net nin --width 192 --seed $s
  cifar nin_192_no_pool_relu_seed$s --net nin --width 192 --no_pool_relu --seed $s
done
wait_for_all

recipe+=(--net nin --width 96 --no_bn --randomcrop_pad 0 --weight_decay 0 --lr "$LR")
for s in $SEEDS; do
  cifar nin_96_no_bn_seed$s --seed $s
  cifar minl2_nin_96_no_bn_seed$s --method minl2 --beta $MINL2_BETA --seed $s
  cifar sym_nin_96_no_bn_seed$s --method sym --beta $SYM_BETA --seed $s
  cifar grad_nin_96_no_bn_from_nin_192_seed$s --teacher_id "$LOGS/nin_192_seed$s" --method grad --beta $GRAD_BETA --seed $s
  cifar kd_nin_96_no_bn_from_nin_192_seed$s --teacher_id "$LOGS/nin_192_seed$s" --alpha 0.9 --seed $s
  cifar at_nin_96_no_bn_from_nin_192_no_pool_relu_seed$s --teacher_id "$LOGS/nin_192_no_pool_relu_seed$s" --beta 1e+3 --seed $s
done
wait_for_all
summarize table3
