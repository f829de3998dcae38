#!/usr/bin/env bash
# Runs an inrank command with torchrun on this machine.
# Usage: launch/torchrun.sh [-n PROCESSES] COMMAND [WORDS ...]
#   launch/torchrun.sh -n 2 train --config configs/quickstart.yaml --parallel.engine zero2
# Without -n there is a process for each GPU, or one where there is none. Words after COMMAND go to inrank unchanged.
# INRANK_VENV names the virtual environment (.venv of this checkout, if it is there; else what is on PATH).
set -euo pipefail
# shellcheck source=processes.sh
. "$(dirname "$0")/processes.sh"
parse_words "$@"
exec torchrun --standalone --nproc-per-node "$processes" -m inrank_dist "${words[@]}"
