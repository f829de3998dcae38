#!/usr/bin/env bash
# Runs an inrank command in several processes, on one node or several: launch/torchrun.sh --help
#   launch/torchrun.sh -n 2 train --config configs/quickstart.yaml --parallel.engine ddp
# Arguments after COMMAND are passed to inrank unchanged. For the differences to torchrun see inrank_dist/launcher/torchrun.py.
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"
trap 'exit 75' TERM INT USR1 HUP # nothing has started yet
use_environment
exec python -m inrank_dist.launcher.torchrun "$@"
