#!/usr/bin/env bash
# Attention transfer from scratch: train a teacher, a student alone, and the same student with attention transfer from that teacher.
#
#   bash scripts/quickstart.sh            on `shapes`, generated images: no download, 2 to 12 minutes on 2 CPU cores
#   bash scripts/quickstart.sh cifar10    on CIFAR-10: 10 epochs, an hour or more on 2 CPU cores
#   DRY_RUN=1 bash scripts/quickstart.sh  only prints the commands
#
# Makes .venv on the first run. Run again, it skips finished runs and continues stopped ones. Environment:
#   SEED=0  EPOCHS=20 on shapes, 10 on cifar10 (published: 200)  SAVE=logs/quickstart  PYTHON, VENV: see setup.sh
#   DATAROOT=~/data  folder of CIFAR-10, downloaded if missing; or a folder with train/CLASS/* and test/CLASS/*
set -euo pipefail

# Before anything is installed.
case ${1:-shapes} in
  shapes | cifar10) ;;
  -h | --help)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit
    ;;
  *)
    echo "$(basename "$0"): error: unknown dataset '$1': choose shapes (default) or cifar10" >&2
    exit 2
    ;;
esac

caller=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }

set_name=${1:-shapes}
case $set_name in
  shapes)
    # A thousand images in few steps: smaller batches and a lower rate than published, and a beta found on seeds 0 to 2.
    data=(--dataset shapes --batch_size 32 --lr 0.03)
    epochs=${EPOCHS:-20} beta=1e+2
    ;;
  cifar10)
    root=$(absolute "${DATAROOT:-$HOME/data}")
    if [ -d "$root/train" ]; then
      data=(--dataset folder --dataroot "$root")
    else
      if [ -z "${DRY_RUN:-}" ] && ! mkdir -p "$root" 2> /dev/null; then
        echo "quickstart.sh: error: DATAROOT=$root: cannot be created; name another folder" >&2
        exit 2
      fi
      data=(--dataset CIFAR10 --dataroot "$root")
    fi
    epochs=${EPOCHS:-10} beta=1e+3
    ;;
esac
seed=${SEED:-0}
save=$(absolute "${SAVE:-$PWD/logs/quickstart}")
[ "$set_name" = shapes ] || save=$save/$set_name
[ "$seed" = 0 ] || save=$save/seed$seed
[ -z "${EPOCHS:-}" ] || save=$save/epochs$EPOCHS # a longer teacher is another teacher

teacher=$save/teacher student=$save/student transfer=$save/student_at

train() {
  echo
  echo "== $1"
  call_python cifar.py "${data[@]}" --epochs "$epochs" --seed "$seed" --resume "${@:2}"
}

train 'teacher: WRN-16-2' --save "$teacher" --depth 16 --width 2
train 'student alone: WRN-16-1' --save "$student" --depth 16 --width 1
train 'student with attention transfer: WRN-16-1' --save "$transfer" --depth 16 --width 1 --teacher_id "$teacher" --beta "$beta"

echo
labels=('teacher WRN-16-2' 'student WRN-16-1' 'student + AT')
call_python scripts/plot.py "$teacher" "$student" "$transfer" --labels "${labels[@]}" --save "$save/curves.png"
call_python scripts/attention.py --weights "$teacher" "$student" "$transfer" --labels "${labels[@]}" --save "$save/attention.png"
echo "next: look at the two pictures; '. .venv/bin/activate', then 'python cifar.py --help'; README.md continues with CIFAR-10"
