#!/usr/bin/env bash
# Lints, then runs the tests; all of the set-up is done here. Needs Python 3.11 to 3.13 with pip.
#
#   bash launch/test.sh [pytest arguments]        for example: bash launch/test.sh tests/data -x
#
# Paths in arguments are seen from the repository root.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/environment.sh quickstart,dev,convert
.venv/bin/python -m ruff check .

# The TPU compiler, which a test of ovseg_jax.aot runs. Beside the packages, not among them: where
# JAX finds it, it looks for a TPU. There is none for other systems.
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    compiler=$(.venv/bin/python -c '
from importlib.metadata import requires
print(next(line.split(";")[0].strip() for line in requires("jax") if line.startswith("libtpu")))')
    folder=.venv/tpu_compiler
    if [ "$compiler" != "$(cat $folder/installed.txt 2>/dev/null)" ]; then
        echo "Installing the TPU compiler into $folder: 210 MB to download"
        rm -rf $folder
        .venv/bin/python -m pip install --quiet --no-deps --target $folder "$compiler"
        echo "$compiler" >$folder/installed.txt
    fi
fi
exec .venv/bin/python -m pytest "$@"
