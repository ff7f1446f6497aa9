#!/usr/bin/env bash
# What of the gain is due to the teacher? Not in the paper. WRN-16-1 on CIFAR-10 alone and with attention transfer (AT) from WRN-16-2, beside
#   AT from an untrained WRN-16-2; AT from a trained WRN-16-1, which is no better than the student; and the student alone, trained for as long a time as with AT.
#
#   bash scripts/controls.sh
#
# Environment: see common.sh. The nets in logs/epochs$EPOCHS are shared with the tables of CIFAR-10. Ends with the table.
# shellcheck disable=SC2086  # seeds are numbers
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEEDS=${SEEDS:-0 1 2 3 4}
EPOCHS=${EPOCHS:-200}
LOGS=${LOGS:-logs/epochs$EPOCHS}
find_cifar CIFAR10

for s in $SEEDS; do
  cifar wrn_16_2_seed$s --epochs $EPOCHS --depth 16 --width 2 --seed $s
  cifar untrained_wrn_16_2_seed$s --epochs 0 --depth 16 --width 2 --seed $s
  cifar wrn_16_1_seed$s --epochs $EPOCHS --depth 16 --width 1 --seed $s
  # A WRN-16-1 learns from that of the next seed, which saw the images in another order.
  next=$((s + 1))
  case " $SEEDS " in *" $next "*) ;; *) cifar wrn_16_1_seed$next --epochs $EPOCHS --depth 16 --width 1 --seed $next ;; esac
done
wait_for_all
for s in $SEEDS; do
  cifar at_wrn_16_1_from_wrn_16_2_seed$s --epochs $EPOCHS --depth 16 --width 1 --teacher_id "$LOGS/wrn_16_2_seed$s" --beta 1e+3 --seed $s
  cifar at_wrn_16_1_from_untrained_wrn_16_2_seed$s --epochs $EPOCHS --depth 16 --width 1 --teacher_id "$LOGS/untrained_wrn_16_2_seed$s" --beta 1e+3 --seed $s
  cifar at_wrn_16_1_from_wrn_16_1_seed$s --epochs $EPOCHS --depth 16 --width 1 --teacher_id "$LOGS/wrn_16_1_seed$((s + 1))" --beta 1e+3 --seed $s
done
wait_for_all

# Sets `longer` to EPOCHS times the measured ratio of the time of an epoch with AT to that of one without. Kept, so that later starts go on with
# the same. A machine that was busier in one of the two misleads it.
measure() {
  local measured=$LOGS/equal_time_to_$EPOCHS status
  if [ -n "${DRY_RUN:-}" ]; then
    echo '# the next --epochs is measured when the runs above are done; here stands what a ratio of 1.5 gives'
    longer=$((EPOCHS * 3 / 2))
    return
  fi
  if [ ! -s "$measured" ]; then
    "$VENV_PYTHON" scripts/summarize.py controls "$LOGS" --equal_time "$EPOCHS" > "$measured.part" || {
      status=$?
      rm -f "$measured.part"
      exit $status
    }
    mv "$measured.part" "$measured"
  fi
  longer=$(cat "$measured")
}

longer=
for s in $SEEDS; do
  is_chosen wrn_16_1_equal_time_seed$s || continue
  [ -n "$longer" ] || measure
  cifar wrn_16_1_equal_time_seed$s --epochs $longer --depth 16 --width 1 --seed $s
done
wait_for_all
summarize controls
