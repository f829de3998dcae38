#!/usr/bin/env bash
# The first command to run: creates the environment, trains configs/quickstart.yaml on two processes with FSDP2, and shows
# the results.
# Usage: launch/quickstart.sh [ARGUMENTS FOR train], for example launch/quickstart.sh --train.steps 200
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"
case ${1:-} in -h | --help) help ;; esac
cd "$(dirname "$0")/.."
make_environment ""

run=runs/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -lt 2 ]; then
    export CUDA_VISIBLE_DEVICES=  # two processes need two GPUs; otherwise run them on the CPU
fi
if [ -d $run ]; then
    echo "== $run exists from an earlier start: resuming it (remove it to start over)"
fi
echo "== Checking the settings"
launch/torchrun.sh -n 2 train --config configs/quickstart.yaml --run.dir $run --dry-run "$@"
echo "== Training on two processes; the standard library of this Python is the text"
launch/torchrun.sh -n 2 train --config configs/quickstart.yaml --run.dir $run "$@" &
training=$!
# Forward signals: nothing else does, and as PID 1 of a container this script would ignore them by default. The training
# saves and exits with status 75, which is also the status of this script.
trap 'kill -TERM "$training"' TERM INT USR1 HUP
status=0
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do  # a signal ends wait before the training has exited
    status=0
    wait "$training" || status=$?
done
trap - TERM INT USR1 HUP
[ "$status" -eq 0 ] || exit "$status"
echo "== The layers after training (inrank inspect --run $run)"
inrank inspect --run $run
echo "== Validation on the whole held-out text (inrank eval --run $run)"
inrank eval --run $run
echo "== A sample (inrank generate --run $run --prompt 'def ')"
inrank generate --run $run --prompt "def " --tokens 96
echo "== Done. Report: $run/report.html   TensorBoard: tensorboard --logdir $run/tensorboard"
