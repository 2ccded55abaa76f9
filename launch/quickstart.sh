#!/usr/bin/env bash
# Trains OVSegmentor on scenes, the embedded data set, and shows what it learned; all of the
# set-up is done here. Needs Python 3.11 to 3.13 with pip, and nothing else.
#
#   bash launch/quickstart.sh [--config.KEY=VALUE ...] [--workdir=...]
#
# Run it again to go on after Ctrl-C. Paths in arguments are seen from the repository root.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/environment.sh quickstart
exec .venv/bin/python -m ovseg_jax.main \
    --config=configs/quickstart.py --workdir=runs/quickstart "$@"
