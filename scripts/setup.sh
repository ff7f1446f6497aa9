# shellcheck shell=bash
# Sourced by the other scripts: `. scripts/setup.sh` changes to the repository root, and sets $VENV_PYTHON to a Python that has all of
# requirements.txt. It makes .venv if needed, and updates it if requirements.txt has changed.
#
#   PYTHON=python3.12   the Python to make .venv with (default: python3); 3.10 or newer, with venv
#   VENV=DIR            your own environment; nothing is installed into it
#   DRY_RUN=1           make and install nothing; the scripts only print their commands

case ${VENV:-/} in /*) ;; *) VENV=$PWD/$VENV ;; esac
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

complain() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

# The command, as a shell would take it.
say() {
  local word line=
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./=+:,@%-]* | '') word="'${word//\'/\'\\\'\'}'" ;; esac
    line="$line $word"
  done
  echo "${line# }"
}

# call_python WORDS...: the Python of VENV_PYTHON; with DRY_RUN the command alone.
call_python() { if [ -n "${DRY_RUN:-}" ]; then say python "$@"; else "$VENV_PYTHON" "$@"; fi; }

# find_python OTHERS...: sets `python` to $PYTHON, or else one of the others, if it is 3.10 or newer.
find_python() {
  for python in "${PYTHON:-python3}" "$@"; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null && return
  done
  python=${PYTHON:-python3}
  command -v "$python" > /dev/null || complain "there is no $python; install Python 3.10 or newer, or name it: PYTHON=/path/to/python3 bash $0"
  complain "$python is $("$python" -V 2>&1); 3.10 or newer is needed: PYTHON=/path/to/python3 bash $0"
}

make_venv() {
  find_python
  "$python" -c 'import venv, ensurepip' 2> /dev/null \
    || complain "$python has no venv; install it (Debian, Ubuntu: apt install python3-venv), or name another: PYTHON=/path/to/python3 bash $0"
  "$python" -m venv --clear .venv
}

install_requirements() {
  echo 'installing requirements.txt into .venv'
  .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt \
    || complain 'the installation failed (see above); run the same command to try again'
  # opencv-python wants libGL, which servers lack. Both packages hold the same cv2.
  if ! .venv/bin/python -c 'import cv2' 2> /dev/null; then
    echo 'opencv-python cannot be imported here (no libGL?): installing opencv-python-headless instead'
    .venv/bin/python -m pip uninstall --yes --quiet opencv-python
    # Forced, as a headless that was there before lost its files to the uninstallation.
    .venv/bin/python -m pip install --disable-pip-version-check --force-reinstall --no-deps opencv-python-headless
    .venv/bin/python -c 'import cv2' || complain 'cv2 cannot be imported (see above)'
  fi
}

if [ -n "${DRY_RUN:-}" ]; then
  VENV_PYTHON=python
elif [ -n "${VENV:-}" ]; then
  VENV_PYTHON=$VENV/bin/python
  [ -x "$VENV_PYTHON" ] || complain "VENV=$VENV: there is no $VENV_PYTHON"
else
  VENV_PYTHON=.venv/bin/python
  # An interpreter that does not start, such as of a copied or half-made .venv, is replaced.
  "$VENV_PYTHON" -m pip --version > /dev/null 2>&1 || { rm -f .venv/installed; make_venv; }
  stamp=$(cksum < requirements.txt)
  if [ "$(cat .venv/installed 2> /dev/null)" != "$stamp" ]; then
    install_requirements
    echo "$stamp" > .venv/installed
  fi
fi
