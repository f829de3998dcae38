#!/usr/bin/env bash
# Runs an inrank command with the deepspeed launcher, on one host or on many: launch/deepspeed.sh --help
#   launch/deepspeed.sh -n 2 train --config configs/quickstart.yaml --parallel.engine zero3 --optimizer.name adamw
# Words after COMMAND go to inrank unchanged. What it does beyond deepspeed: inrank_dist/launcher/deepspeed.py.
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"
trap 'exit 75' TERM INT USR1 HUP  # nothing has begun
use_environment
exec python -m inrank_dist.launcher.deepspeed "$@"
