#!/usr/bin/env bash
# Check the style of the repository, then run the tests. Makes .venv first if there is none (see setup.sh).
#
#   bash scripts/test.sh                      everything; 3 to 6 minutes on 2 CPU cores
#   bash scripts/test.sh tests/test_utils.py  arguments go to pytest
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE # each script that a test starts would compile our modules again
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
# One process per core; each takes half a GB.
exec "$VENV_PYTHON" -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
