#!/usr/bin/env bash
# Table 4 of the paper: nets trained on ImageNet are fine-tuned for birds and for indoor scenes. ResNet-34 first; it then teaches ResNet-18.
#
#   python scripts/prepare_cub.py CUB_200_2011 birds && python scripts/prepare_scenes.py indoorCVPR_09 rooms
#   python scripts/convert.py resnet18 resnet-18.hkl && python scripts/convert.py resnet34 resnet-34.hkl
#   CUB=birds SCENES=rooms bash scripts/table4.sh
#
# Environment: CUB, SCENES (one of them is enough), STUDENT_PARAMS=resnet-18.hkl, TEACHER_PARAMS=resnet-34.hkl, NPROC: see table5.sh; the rest
# as in common.sh. Ends with the table.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS-0 1 2 3 4}
EPOCHS=${EPOCHS:-50}
LOGS=${LOGS:-logs/imagenet}
export CUB SCENES STUDENT_PARAMS=${STUDENT_PARAMS:-resnet-18.hkl} TEACHER_PARAMS=${TEACHER_PARAMS:-resnet-34.hkl}
[ -n "${CUB:-}${SCENES:-}" ] || complain 'CUB and SCENES are not set: set at least one, to a folder written by scripts/prepare_cub.py or scripts/prepare_scenes.py'
check_file STUDENT_PARAMS 'python scripts/convert.py resnet18 resnet-18.hkl'
check_file TEACHER_PARAMS 'python scripts/convert.py resnet34 resnet-34.hkl'

# The paper states neither lr, epochs, batch size nor beta. These are usual for fine-tuning, and no others have been tried.
run_list <<'RUNS'
tune = imagenet.py --finetune --epochs $EPOCHS --batch_size 64 --lr 0.01
birds = $tune --imagenetpath $CUB
rooms = $tune --imagenetpath $SCENES

cub_resnet_34_seed$s | - | 26.5 | $birds --depth 34 --student_params $TEACHER_PARAMS --seed $s
cub_resnet_18_seed$s | - | 28.5 | $birds --depth 18 --student_params $STUDENT_PARAMS --seed $s

wait

== CUB, ResNet-18 from ResNet-34 | cub_resnet_18 | cub_resnet_34
kd_cub_resnet_18_from_resnet_34_seed$s | KD | 27 | $birds --depth 18 --student_params $STUDENT_PARAMS --teacher_params $LOGS/cub_resnet_34_seed$s --alpha 0.9 --seed $s
at_cub_resnet_18_from_resnet_34_seed$s | AT | 27 | $birds --depth 18 --student_params $STUDENT_PARAMS --teacher_params $LOGS/cub_resnet_34_seed$s --at_groups 2,3 --beta 1e+3 --seed $s

wait

scenes_resnet_34_seed$s | - | 26.0 | $rooms --depth 34 --student_params $TEACHER_PARAMS --seed $s
scenes_resnet_18_seed$s | - | 28.2 | $rooms --depth 18 --student_params $STUDENT_PARAMS --seed $s

wait

== Scenes, ResNet-18 from ResNet-34 | scenes_resnet_18 | scenes_resnet_34
kd_scenes_resnet_18_from_resnet_34_seed$s | KD | 28.1 | $rooms --depth 18 --student_params $STUDENT_PARAMS --teacher_params $LOGS/scenes_resnet_34_seed$s --alpha 0.9 --seed $s
at_scenes_resnet_18_from_resnet_34_seed$s | AT | 27.1 | $rooms --depth 18 --student_params $STUDENT_PARAMS --teacher_params $LOGS/scenes_resnet_34_seed$s --at_groups 2,3 --beta 1e+3 --seed $s

summarize table4
RUNS
