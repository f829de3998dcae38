#!/usr/bin/env bash
# Runs an inrank command with the deepspeed launcher on this machine.
# Usage: launch/deepspeed.sh [-n PROCESSES] COMMAND [WORDS ...]
#   launch/deepspeed.sh -n 2 train --config configs/quickstart.yaml --parallel.engine zero3
# Without -n there is a process for each GPU, or one where there is none. Words after COMMAND go to inrank unchanged.
# CUDA_VISIBLE_DEVICES chooses GPUs as always; empty: the CPU. SIGTERM, SIGINT and SIGUSR1 go to the training.
# INRANK_VENV names the virtual environment (.venv of this checkout, if it is there; else what is on PATH).
set -euo pipefail
# shellcheck source=processes.sh
. "$(dirname "$0")/processes.sh"
parse_words "$@"
command -v deepspeed >/dev/null || fail "deepspeed is not installed; write pip install -e '.[deepspeed]'"

# The launcher's fixed port would be taken by the next job on this machine.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
options=(--master_addr 127.0.0.1 --master_port "$port" --no_local_rank)
if [ "${#gpus[@]}" -eq 0 ]; then
    # The launcher shows its processes as many GPUs as there are processes, whatever it was shown itself.
    export DS_ACCELERATOR=cpu
    options+=(--num_gpus "$processes" --no_python env CUDA_VISIBLE_DEVICES= python -u -m inrank_dist)
else
    [ "$processes" -le "${#gpus[@]}" ] || fail "-n is $processes, but there are ${#gpus[@]} GPUs; write at most that"
    chosen=$(IFS=, && echo "${gpus[*]:0:processes}")
    options+=(--include "localhost:$chosen" --module inrank_dist)
fi

# The launcher passes no signal on. Its own child starts the training's processes; they are who must hear.
# shellcheck disable=SC2329  # the traps call it
pass_on() {
    python - "$launcher" "$1" <<'PYTHON'
import signal, sys
import psutil

launcher, name = psutil.Process(int(sys.argv[1])), sys.argv[2]
for starter in launcher.children():
    for process in starter.children():
        process.send_signal(getattr(signal, name))
PYTHON
}
deepspeed "${options[@]}" "${words[@]}" &
launcher=$!
for name in TERM INT USR1; do
    # shellcheck disable=SC2064
    trap "pass_on SIG$name" "$name"
done
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do  # a signal ends wait before the launcher
    status=0
    wait "$launcher" || status=$?
done
exit "$status"
