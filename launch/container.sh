#!/usr/bin/env bash
# Runs an inrank command in the image (see Dockerfile) with docker, podman or apptainer, whichever is there.
# Usage: launch/container.sh [-i IMAGE] [-e ENGINE] [-d FOLDER]... [-p] [-n PROCESSES] [-N NODES] [-m HOST[:PORT]]
#                            [-k NODE_RANK] [-r RESTARTS] [-w SECONDS] COMMAND [WORDS ...]
#   launch/container.sh -n 2 train --config /inrank/configs/quickstart.yaml
#   launch/container.sh -i inrank_dist:cuda -d /data -N 2 -m node1 train --config my.yaml         the same on both nodes
#   -i  the image (inrank_dist; for apptainer a file, inrank_dist.sif)
#   -e  docker, podman or apptainer, where the first that is there, in this order, is not the one
#   -d  a further folder that is to be seen inside, such as that of the data; it may be said more than once
#   -p  print what would be run, and do not run it
# The others are those of launch/torchrun.sh, which runs inside. The current folder is the same inside and outside, so
# that paths in a config mean the same; what is written there is yours. Prepared data stays in ~/.cache/inrank_dist.
# GPUs are there if nvidia-smi shows any, the network is this machine's, and variables NCCL_*, GLOO_*, INRANK_*,
# SLURM_*, TORCH_*, HF_TOKEN, OMP_NUM_THREADS and CUDA_VISIBLE_DEVICES are passed. SIGTERM, SIGINT, SIGUSR1 and SIGHUP go
# to the training.
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"

[ "${1:-}" != --help ] || help
image='' engine='' print='' folders=("$PWD") options=()
while getopts ":hi:e:d:pn:N:m:k:r:w:" option; do
    case $option in
        i) image=$OPTARG ;;
        e) engine=$OPTARG ;;
        d) folders+=("$(cd "$OPTARG" 2>/dev/null && pwd)") || fail "-d is $OPTARG; write a folder that is there" ;;
        p) print=yes ;;
        h) help ;;
        :) fail "-$OPTARG lacks its value; see $0 --help" ;;
        \?) fail "-$OPTARG is no option of $0; see $0 --help" ;;
        *) options+=("-$option" "$OPTARG") ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || fail "no command; write $0 [-i IMAGE] [-n PROCESSES] COMMAND, such as train --config FILE"
[ "$PWD" != / ] || fail "the current folder is /, which cannot be put into a container; go to the folder of the run"
case $engine in
    "") for engine in docker podman apptainer none; do ! command -v "$engine" >/dev/null || break; done ;;
    docker | podman | apptainer)
        command -v "$engine" >/dev/null || fail "-e is $engine, which is not on PATH; without -e what is there is taken"
        ;;
    *) fail "-e is $engine; write docker, podman or apptainer" ;;
esac
[ "$engine" != none ] || fail "no docker, podman or apptainer on PATH; install one, or do without: launch/torchrun.sh"

cache=$HOME/.cache/inrank_dist
count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
if [ "$engine" = apptainer ]; then
    # It runs as the user, with the home folder and the environment of outside; this of it would mislead the image.
    unset INRANK_VENV PYTHONPATH PYTHONHOME
    words=(apptainer exec --pwd "$PWD" --bind "$cache")
    [ "$count" -eq 0 ] || words+=(--nv)
    for folder in "${folders[@]}"; do words+=(--bind "$folder"); done
    image=${image:-inrank_dist.sif}
else
    # --ipc host: the memory that processes share, which NCCL and data loaders need more of than containers have.
    # --stop-timeout: to save takes longer than 10 s; it ends after checkpoint.grace_seconds by itself.
    words=("$engine" run --rm --network host --ipc host --stop-timeout 180 --workdir "$PWD")
    words+=(--volume "$cache:/home/inrank/.cache/inrank_dist")
    for folder in "${folders[@]}"; do words+=(--volume "$folder:$folder"); done
    if [ "$engine" = podman ]; then
        words+=(--security-opt label=disable) # else SELinux hides the folders
    fi
    if [ "$engine" = podman ] && [ "$(id -u)" != 0 ]; then
        words+=(--userns keep-id)
    fi
    words+=(--user "$(id -u):$(id -g)")
    if [ "$count" -gt 0 ] && [ "$engine" = docker ]; then
        words+=(--gpus all)
    elif [ "$count" -gt 0 ]; then
        words+=(--device nvidia.com/gpu=all)
    fi
    if [ -d /dev/infiniband ]; then
        words+=(--device /dev/infiniband --ulimit memlock=-1)
    fi
    for name in $(compgen -e); do
        case $name in
            INRANK_VENV) ;; # of outside
            NCCL_* | GLOO_* | INRANK_* | SLURM_* | TORCH_* | HF_TOKEN | OMP_NUM_THREADS | CUDA_VISIBLE_DEVICES)
                words+=(--env "$name")
                ;;
        esac
    done
    image=${image:-inrank_dist}
fi
words+=("$image" /inrank/launch/torchrun.sh "${options[@]}" "$@")
if [ "$print" ]; then
    printf '%q ' "${words[@]}"
    echo
    exit
fi
mkdir -p "$cache" # or the engine makes it, as root
exec "${words[@]}"
