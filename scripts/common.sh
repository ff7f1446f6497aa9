# shellcheck shell=bash
# You can stop or kill a script at any time. Start it again to continue: finished runs are skipped. Environment variables:
#
#   SEEDS="0 1 2"     seeds of the runs; a student learns from the teacher of its own seed
#   EPOCHS=200        epochs of each run
#   DATAROOT=~/data   folder of the CIFAR files, downloaded if missing; or a folder with train/CLASS/* and test/CLASS/*
#   LOGS=DIR          folder for the runs
#   EXTRA="--dtype bfloat16 --compile"   options added to each run
#   JOBS=2            number of runs at a time, each on its own GPU if there are several; output goes to LOGS/NAME.out
#                     (on a single GPU, first start nvidia-cuda-mps-control -d, or the runs take turns)
#   ONLY="wrn_* *_from_wrn_16_2*"        only the runs whose names match one of these patterns
#   DRY_RUN=1         only print the commands
#   PYTHON, VENV      see setup.sh
#
# Scripts with the same LOGS may run at the same time, also on several machines: each waits for a net that another one is training.
# On a cluster, start one job per seed. The table covers every seed that is finished in LOGS. With Slurm:
#
#   bash scripts/setup.sh && sbatch --array=0-4 --gpus=1 --wrap 'SEEDS=$SLURM_ARRAY_TASK_ID bash scripts/table1.sh'

# Sourced by the scripts that reproduce tables and figures. Each has a list of runs (see table_list.py), which run_list.py trains.
# Options come from the environment. Any argument except --help is an error, and starts no training.
case ${1:-} in
  '') ;;
  -h | --help)
    for file in "$0" "${BASH_SOURCE[0]}"; do
      [ "$file" = "$0" ] || echo
      sed -n '2,${/^#/!q;/^# shellcheck/d;s/^# \{0,1\}//p;}' "$file"
    done
    exit
    ;;
  *)
    echo "$(basename "$0"): error: $1: takes no arguments; see $0 --help for environment variables" >&2
    exit 2
    ;;
esac

complain() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

# check_file VARIABLE COMMAND: the file that the variable names must be there; the command makes one.
check_file() {
  [ -n "${DRY_RUN:-}" ] || [ -e "${!1}" ] || complain "$1=${!1}: no such file; make one with $2, or name another"
}

# Trains the list on stdin, and does not return.
run_list() {
  local list
  list=$(cat)
  export SEEDS EPOCHS LOGS DATAROOT=${DATAROOT:-$HOME/data} CALLER=$PWD
  # A dry run finds mistakes in the environment before anything is installed.
  DRY_RUN=1 . "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
  find_python "${VENV:-.venv}/bin/python" # the standard library is enough here
  if [ -z "${DRY_RUN:-}" ]; then
    DRY_RUN=1 "$python" scripts/run_list.py "$0" <<< "$list" > /dev/null
    . scripts/setup.sh
  fi
  export VENV_PYTHON
  exec "$python" scripts/run_list.py "$0" <<< "$list"
}

# A LOGS that is given is the caller's; the default is in the repository.
case ${LOGS:-/} in /*) ;; *) LOGS=$PWD/$LOGS ;; esac
case ${EPOCHS:-1} in *[!0-9]* | 0[0-9]*) complain "EPOCHS=$EPOCHS: must be a whole number" ;; esac
# --beta of F-ActT, which the paper does not state: the best of 10, 100, 1e+3 and 1e+4 on held-out training images (docs/results.md).
export FACTT_BETA=1e+3
