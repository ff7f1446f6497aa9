#!/usr/bin/env bash
# The whole test suite, on a bare machine too: makes .venv first where there is none (see setup.sh).
#
#   bash scripts/test.sh                      everything; 10 minutes on 2 CPU cores of 2017, less on newer ones
#   bash scripts/test.sh tests/test_utils.py  what pytest is given
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Side by side, a core each; each process takes half a GB.
exec "$VENV_PYTHON" -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
