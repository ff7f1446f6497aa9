# shellcheck shell=bash
# Sourced by the scripts that reproduce tables and figures. Each line of theirs is a run, whose name is that of its folder in LOGS.
# They may be stopped, or killed, and started again at any time: what is done is skipped, and what was cut off goes on. Environment:
#
#   SEEDS="0 1 2"   seed s learns from the teacher of seed s          EPOCHS=200   length of a run
#   DATAROOT=~/data where the CIFAR files are, or go; a folder with train/CLASS/* and test/CLASS/* is used as it is
#   LOGS=DIR        where the runs go                                 EXTRA="--dtype bfloat16 --compile"   options that each run ends with
#   JOBS=2          runs side by side, each on a GPU of its own where there are several; what they print is then in LOGS/NAME.out
#                   (on one GPU start nvidia-cuda-mps-control -d before, or they take turns)
#   ONLY="wrn_* *_from_wrn_16_2*"   only the runs whose names match one of these patterns
#   DRY_RUN=1       print the commands, and do nothing                PYTHON, VENV: see setup.sh
#
# Two of these scripts at a time may come to the same net; the second then stops and says so.

# Options come from the environment. Any argument but --help is a mistake, and starts no training.
case ${1:-} in
  '') ;;
  -h | --help)
    for file in "$0" "${BASH_SOURCE[0]}"; do
      [ "$file" = "$0" ] || echo
      sed -n '2,/^[^#]/{/^# shellcheck/d;s/^# \{0,1\}//p;}' "$file"
    done
    exit
    ;;
  *)
    echo "$(basename "$0"): error: $1: takes no options; $0 --help tells what it takes from the environment" >&2
    exit 2
    ;;
esac

caller=$PWD
# What is wrong with the environment shows before anything is installed or trained: first a dry run.
[ -n "${DRY_RUN:-}" ] || DRY_RUN=1 bash "$0" > /dev/null
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# A path of the caller's as it is seen from the repository root, which is the working directory now.
from_root() {
  local path=$1
  case $path in /*) ;; *) path=$caller/$path ;; esac
  echo "${path#"$PWD"/}"
}

JOBS=${JOBS:-1}
case $JOBS in *[!0-9]* | 0*) complain "JOBS=$JOBS: must be a whole number of at least 1" ;; esac
case ${EPOCHS:-1} in *[!0-9]* | 0[0-9]*) complain "EPOCHS=$EPOCHS: must be a whole number" ;; esac
case " ${SEEDS:-0} " in *[!0-9\ ]* | *\ 0[0-9]*) complain "SEEDS=$SEEDS: must be whole numbers, such as SEEDS=\"0 1 2\"" ;; esac
[ -z "${SEEDS:-}" ] || [ -n "${SEEDS// /}" ] || complain "SEEDS='$SEEDS': names no seed; leave it out, or give some, such as SEEDS=\"0 1 2\""
[ -z "${LOGS:-}" ] || LOGS=$(from_root "$LOGS")
DATAROOT=$(from_root "${DATAROOT:-$HOME/data}")
read -r -a extra <<< "${EXTRA:-}"
read -r -a only <<< "${ONLY:-*}"
python=("$VENV_PYTHON")
# --beta of F-ActT, which the paper does not state: the best of 10, 100, 1e+3 and 1e+4 on held-out training images (docs/README.md).
FACTT_BETA=1e+3
recipe=() # the options of all runs, which the script that sources this fills in
IFS=, read -r -a gpus <<< "${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | tr '\n' ,)}"

# ---------------------------------------------------------------- runs

# find_cifar CIFAR10: sets `dataset` to the options that say where that set is.
find_cifar() {
  dataset=(--dataset "$1" --dataroot "$DATAROOT")
  if [ -d "$DATAROOT/train" ]; then
    dataset=(--dataset folder --dataroot "$DATAROOT")
    local classes=("$DATAROOT"/train/*/)
    [ "$1" != CIFAR100 ] || [ ${#classes[@]} = 100 ] || complain "DATAROOT=$DATAROOT: has ${#classes[@]} folders in train, not the 100 classes of CIFAR-100"
  fi
  [ -z "${DRY_RUN:-}" ] && [ "${dataset[1]}" = "$1" ] || return 0
  case " ${EXTRA:-} " in *' --dataset'[\ =]*) return ;; esac
  mkdir -p "$DATAROOT"
  # Fetched once, before runs side by side would do so into the same files.
  [ "$JOBS" = 1 ] || "$VENV_PYTHON" -c '
import sys, data
from support.program import call_main
sys.argv[0] = "cifar.py"
sys.exit(call_main(lambda argv: data.open_sets(*argv), sys.argv[1:]))' "$1" "$DATAROOT"
}

# cifar NAME OPTIONS...: the run LOGS/NAME. `${a[@]+"${a[@]}"}` is an array that may be empty, for bash 3.2.
cifar() { run cifar.py "$1" "${dataset[@]}" ${recipe[@]+"${recipe[@]}"} "${@:2}"; }

# imagenet NAME OPTIONS...
imagenet() { run imagenet.py "$1" ${recipe[@]+"${recipe[@]}"} "${@:2}"; }

# Sets `python` to torchrun where NPROC asks for several processes in a run.
use_processes() {
  case ${NPROC:-1} in *[!0-9]* | 0*) complain "NPROC=$NPROC: must be a whole number of at least 1" ;; esac
  [ "${NPROC:-1}" -gt 1 ] || return 0
  [ "$JOBS" = 1 ] || complain "NPROC=$NPROC with JOBS=$JOBS: give one of them, runs that share the GPUs or runs side by side"
  python+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")
}

# check_file VARIABLE COMMAND: the file that the variable names must be there; the command makes one.
check_file() {
  [ -n "${DRY_RUN:-}" ] || [ -e "${!1}" ] || complain "$1=${!1}: there is no such file; make one with $2, or name another"
}

# is_chosen NAME: whether ONLY has it.
is_chosen() {
  local pattern
  for pattern in ${only[@]+"${only[@]}"}; do
    # shellcheck disable=SC2053  # a pattern it is
    [[ $1 != $pattern ]] || return 0
  done
  return 1
}

chosen=0  # the number of runs that ONLY has
folders=' ' # of a dry run: those of its runs so far

# value_of "OPTION..." WORDS...: what follows the last of these options in a command.
value_of() {
  local options=" $1 " value=
  shift
  while [ $# -gt 1 ]; do
    case $options in *" $1 "*) value=$2 ;; esac
    shift
  done
  echo "$value"
}

# check_teacher NAME OPTIONS...: its teacher must be there, or be trained by a run before it.
check_teacher() {
  local name=$1 teacher
  teacher=$(value_of '--teacher_id --teacher_params' "$@")
  case $teacher in "$LOGS"/*) ;; *) return 0 ;; esac
  case $folders in *" $teacher "*) return 0 ;; esac
  [ -e "$teacher" ] || complain "ONLY=${ONLY:-}: has $name, but not its teacher, ${teacher#"$LOGS"/}, which is not in $LOGS either; add it to ONLY"
}

pids=() names=() commands=() # of the runs under way, by slot: 0 to JOBS - 1

run() {
  is_chosen "$2" || return 0
  chosen=$((chosen + 1))
  local script=$1 name=$2 i launch=("${python[@]}")
  local words=("$script" --save "$LOGS/$name" "${@:3}" --resume ${extra[@]+"${extra[@]}"})
  if [ -n "${DRY_RUN:-}" ]; then
    check_teacher "${@:2}"
    folders="$folders$LOGS/$name "
    say "${python[@]}" "${words[@]}"
    return
  fi
  check_length "$LOGS/$name" "${words[@]}"
  if is_done "$LOGS/$name" "$(say "${words[@]}")"; then
    echo "== $name: done"
    return
  fi
  wait_for_slot
  i=$slot
  echo "== $name"
  names[i]=$name commands[i]=$(say "${words[@]}")
  if [ "$JOBS" = 1 ]; then
    "${launch[@]}" "${words[@]}" &
  else
    mkdir -p "$LOGS"
    [ ${#gpus[@]} -lt 2 ] || launch=(env CUDA_VISIBLE_DEVICES="${gpus[i % ${#gpus[@]}]}" "${launch[@]}")
    "${launch[@]}" "${words[@]}" >> "$LOGS/$name.out" 2>&1 &
  fi
  pids[i]=$!
  [ "$JOBS" -gt 1 ] || wait_for_all
}

# is_done FOLDER COMMAND: whether a run of that very command has ended well there, without a start of Python, which compares every option. A kill
# between the log and the weights leaves weights that are older, which the run itself then puts right.
is_done() {
  [ -f "$1/log.txt" ] && [ -f "$1/model.hkl" ] && [ ! "$1/log.txt" -nt "$1/model.hkl" ] || return 1
  [ "$(cat "$1/command.txt" 2> /dev/null)" = "$2" ]
}

# check_length FOLDER OPTIONS...: a run of another length that is there already would keep its own schedule.
check_length() {
  local folder=$1 epochs old
  case " ${EXTRA:-} " in *' --epochs'[\ =]*) return 0 ;; esac # which asks for it
  epochs=$(value_of --epochs "$@")
  old=$(grep -o '"epochs": [0-9]*' "$folder/log.txt" 2> /dev/null | tail -n 1) || return 0
  [ "${old##* }" = "$epochs" ] || complain "LOGS=$LOGS: holds $(basename "$folder") of ${old##* } epochs, not $epochs; name another folder"
}

# Sets `slot` to a free one, and waits until there is one.
wait_for_slot() {
  while :; do
    collect
    for ((slot = 0; slot < JOBS; slot++)); do
      [ -n "${pids[slot]:-}" ] || return 0
    done
    sleep 0.2
  done
}

# Waits for all runs: a teacher must be finished before its students begin.
wait_for_all() {
  while collect && [ "$under_way" -gt 0 ]; do sleep 0.2; done
}

# Frees the slots of runs that have ended, and sets `under_way` to the number of those that have not. A run that failed ends the script.
collect() {
  local i status running
  running=" $(jobs -rp | tr '\n' ' ')" under_way=0
  for ((i = 0; i < JOBS; i++)); do
    [ -n "${pids[i]:-}" ] || continue
    case $running in *" ${pids[i]} "*)
      under_way=$((under_way + 1))
      continue
      ;;
    esac
    status=0
    wait "${pids[i]}" || status=$?
    pids[i]=
    [ "$status" = 0 ] || fail "${names[i]}" "$status"
    echo "${commands[i]}" > "$LOGS/${names[i]}/command.txt"
  done
}

fail() {
  local output="$LOGS/$1.out"
  if [ "$JOBS" -gt 1 ]; then tail -n 3 "$output" >&2; fi
  echo "$(basename "$0"): error: the run $1 failed, exit status $2 (see above); once that is put right, the same command goes on" >&2
  exit "$2"
}

# Whatever ends the script ends its runs, which first finish what they write.
stop_runs() {
  local pid
  trap '' INT TERM
  for pid in ${pids[@]+"${pids[@]}"}; do
    [ -z "$pid" ] || kill "$pid" 2> /dev/null || true
  done
  wait
}
trap stop_runs EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ---------------------------------------------------------------- results

# tool WORDS...: a script that reads what the runs have written.
tool() {
  [ "$chosen" -gt 0 ] || complain "ONLY=${ONLY:-}: no run here has such a name; DRY_RUN=1 without ONLY shows their names, after --save"
  call_python "$@"
}

# summarize TABLE [PICTURE]: the table of the runs in LOGS, printed, and written beside them.
# shellcheck disable=SC2086  # seeds are numbers
summarize() { tool scripts/summarize.py "$1" "$LOGS" --seeds $SEEDS --save "$LOGS/$1.md" "${@:2}"; }

# evaluate NAME WEIGHTS OPTIONS...: imagenet.py tests a net as it is; the command and what it prints are kept as LOGS/NAME.txt, and not done again.
evaluate() {
  is_chosen "$1" || return 0
  chosen=$((chosen + 1))
  local words=(imagenet.py "${@:3}" --evaluate "$2" ${extra[@]+"${extra[@]}"}) file=$LOGS/$1.txt
  if [ -n "${DRY_RUN:-}" ]; then
    say "${python[@]}" "${words[@]}"
  elif [ "$(head -n 1 "$file" 2> /dev/null)" != "$(say "${words[@]}")" ] || [ "$2" -nt "$file" ]; then
    echo "== $1"
    mkdir -p "$LOGS"
    say "${words[@]}" > "$file.part"
    "${python[@]}" "${words[@]}" >> "$file.part" & # so that a signal need not wait for its end
    pids[JOBS]=$!
    wait "${pids[JOBS]}" || complain "the test of $1 failed (see above)"
    pids[JOBS]=
    mv "$file.part" "$file"
    cat "$file"
  fi
}
