#!/usr/bin/env bash
# Runs an inrank command with the DeepSpeed launcher, on one host or several: launch/deepspeed.sh --help
#   launch/deepspeed.sh -n 2 train --config configs/quickstart.yaml --parallel.engine zero3 --optimizer.name adamw
# Arguments after COMMAND are passed to inrank unchanged. For the differences to deepspeed see inrank_dist/launcher/deepspeed.py.
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"
trap 'exit 75' TERM INT USR1 HUP  # nothing has started yet
use_environment
exec python -m inrank_dist.launcher.deepspeed "$@"
