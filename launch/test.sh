#!/usr/bin/env bash
# Lints, then runs the tests; all of the set-up is done here. Needs Python 3.11 to 3.13 with pip.
#
#   bash launch/test.sh [pytest arguments]        for example: bash launch/test.sh tests/data -x
#
# Paths in arguments are seen from the repository root.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/environment.sh quickstart,dev
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest "$@"
