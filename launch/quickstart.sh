#!/usr/bin/env bash
# Trains OVSegmentor on scenes, the embedded data set, shows what it learned, and segments the
# photographs in launch/photographs with the model that comes with ovseg_jax; all of the set-up is
# done here. Needs Python 3.11 to 3.13 with pip, and nothing else.
#
#   bash launch/quickstart.sh [--config.KEY=VALUE ...] [--workdir=...]
#
# Run it again to go on after Ctrl-C. Paths in arguments are seen from the repository root.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/environment.sh quickstart
.venv/bin/python -m ovseg_jax.main \
    --config=configs/quickstart.py --workdir=runs/quickstart "$@"

# The model above has seen drawings only. This one was trained on photographs.
printf '\nThe model that comes with ovseg_jax, on launch/photographs:\n'
exec .venv/bin/python -m ovseg_jax.predict --images=launch/photographs \
    --classes="cat,cup,woman|astronaut,rocket" --out=runs/photographs --overwrite
