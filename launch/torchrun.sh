#!/usr/bin/env bash
# Runs an inrank command in several processes, on one node or on many: launch/torchrun.sh --help
#   launch/torchrun.sh -n 2 train --config configs/quickstart.yaml --parallel.engine ddp
# Words after COMMAND go to inrank unchanged. What it does beyond torchrun: inrank_dist/launcher/torchrun.py.
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"
trap 'exit 75' TERM INT USR1 HUP # nothing has begun
use_environment
exec python -m inrank_dist.launcher.torchrun "$@"
