#!/usr/bin/env bash
# The first command: makes the environment, then trains configs/quickstart.yaml on two processes with FSDP2, and shows
# what came of it. Words after the script's name are passed to train: launch/quickstart.sh --train.steps 200
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment ""

run=runs/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -lt 2 ]; then
    export CUDA_VISIBLE_DEVICES=  # two processes need two GPUs; without, they run on the CPU
fi
if [ -d $run ]; then
    echo "== $run is there from an earlier start: going on with it (remove it to start anew)"
fi
echo "== Checking the settings"
inrank train --config configs/quickstart.yaml --dry-run "$@"
echo "== Training on two processes; the standard library of this Python is the text"
launch/torchrun.sh -n 2 train --config configs/quickstart.yaml --run.dir $run "$@" &
training=$!
# Nobody else passes a signal on, and as the first process of a container this script would not even hear it. The
# training saves and ends; its status, 75, is that of this script.
trap 'kill -TERM "$training"' TERM INT USR1 HUP
status=0
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do  # a signal ends wait before the training
    status=0
    wait "$training" || status=$?
done
trap - TERM INT USR1 HUP
[ "$status" -eq 0 ] || exit "$status"
echo "== What became of each layer (inrank inspect --run $run)"
inrank inspect --run $run
echo "== Validation on the whole held-out text (inrank eval --run $run)"
inrank eval --run $run
echo "== A sample (inrank generate --run $run --prompt 'def ')"
inrank generate --run $run --prompt "def " --tokens 96
echo "== Done. Report: $run/report.html   TensorBoard: tensorboard --logdir $run/tensorboard"
