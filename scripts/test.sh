#!/usr/bin/env bash
# The whole test suite, on a bare machine too: makes .venv first where there is none (see setup.sh).
#
#   bash scripts/test.sh                      everything, under 10 minutes on 2 CPU cores of 2024, 11 on 2 of 2017
#   bash scripts/test.sh tests/test_utils.py  what pytest is given
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Side by side, a core each; each process takes half a GB.
exec "$VENV_PYTHON" -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
