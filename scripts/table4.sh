#!/usr/bin/env bash
# Table 4 of the paper: nets trained on ImageNet are fine-tuned for birds and for indoor scenes. ResNet-34 first; it then teaches ResNet-18.
#
#   python scripts/prepare_cub.py CUB_200_2011 birds && python scripts/prepare_scenes.py indoorCVPR_09 rooms
#   python scripts/convert.py resnet18 resnet-18.hkl && python scripts/convert.py resnet34 resnet-34.hkl
#   CUB=birds SCENES=rooms bash scripts/table4.sh
#
# Environment: CUB, SCENES (one of them is enough), STUDENT_PARAMS=resnet-18.hkl, TEACHER_PARAMS=resnet-34.hkl, NPROC: see table5.sh; else as
# common.sh. Ends with the table.
# shellcheck disable=SC2086  # seeds are numbers
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS:-0 1 2 3 4}
LOGS=${LOGS:-logs/imagenet}
STUDENT_PARAMS=$(from_root "${STUDENT_PARAMS:-resnet-18.hkl}")
TEACHER_PARAMS=$(from_root "${TEACHER_PARAMS:-resnet-34.hkl}")
[ -n "${CUB:-}${SCENES:-}" ] || complain 'CUB and SCENES: give at least one of them, a folder that scripts/prepare_cub.py or scripts/prepare_scenes.py has made'
check_file STUDENT_PARAMS 'python scripts/convert.py resnet18 resnet-18.hkl'
check_file TEACHER_PARAMS 'python scripts/convert.py resnet34 resnet-34.hkl'
use_processes

# lr, epochs, batch size and beta are not stated in the paper. These are usual for fine-tuning, and have not been tried against others.
EPOCHS=${EPOCHS:-50}
recipe=(--finetune --epochs "$EPOCHS" --batch_size 64 --lr 0.01)
BETA=1e+3

# fine_tune NAME DIR: the rows of one set.
fine_tune() {
  local set=$1 s
  recipe+=(--imagenetpath "$(from_root "$2")")
  for s in $SEEDS; do
    imagenet ${set}_resnet_34_seed$s --depth 34 --student_params "$TEACHER_PARAMS" --seed $s
    imagenet ${set}_resnet_18_seed$s --depth 18 --student_params "$STUDENT_PARAMS" --seed $s
  done
  wait_for_all
  recipe+=(--depth 18 --student_params "$STUDENT_PARAMS")
  for s in $SEEDS; do
    imagenet kd_${set}_resnet_18_from_resnet_34_seed$s --teacher_params "$LOGS/${set}_resnet_34_seed$s" --alpha 0.9 --seed $s
    imagenet at_${set}_resnet_18_from_resnet_34_seed$s --teacher_params "$LOGS/${set}_resnet_34_seed$s" --at_groups 2,3 --beta $BETA --seed $s
  done
  wait_for_all
}

common=("${recipe[@]}")
[ -z "${CUB:-}" ] || fine_tune cub "$CUB"
recipe=("${common[@]}")
[ -z "${SCENES:-}" ] || fine_tune scenes "$SCENES"
summarize table4
