#!/usr/bin/env bash
# Runs an inrank command in the image (see Dockerfile) with docker, podman or apptainer, whichever is available.
# Usage: launch/container.sh [-i IMAGE] [-e ENGINE] [-d FOLDER]... [-p] [-n PROCESSES] [-N NODES] [-m HOST[:PORT]]
#                            [-k NODE_RANK] [-r RESTARTS] [-w SECONDS] COMMAND [ARGUMENTS ...]
#   launch/container.sh -n 2 train --config /inrank/configs/quickstart.yaml
#   launch/container.sh -i inrank_dist:cuda -d /data -N 2 -m node1 train --config my.yaml         the same on both nodes
#   -i  image (default: inrank_dist; for apptainer the file inrank_dist.sif)
#   -e  docker, podman or apptainer (default: the first of these on PATH)
#   -d  additional folder to mount, such as that of the data; may be repeated
#   -p  print the command instead of running it
# The other options are those of launch/torchrun.sh, which runs inside. The current folder has the same path inside and
# outside, so that paths in a config work in both; files written there are yours. Prepared data stays in
# ~/.cache/inrank_dist. GPUs are available if nvidia-smi lists any. The container uses this machine's network, and gets the
# variables NCCL_*, GLOO_*, INRANK_*, SLURM_*, TORCH_*, HF_TOKEN, OMP_NUM_THREADS and CUDA_VISIBLE_DEVICES. SIGTERM, SIGINT,
# SIGUSR1 and SIGHUP reach the training.
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"

[ "${1:-}" != --help ] || help
image='' engine='' print='' folders=("$PWD") options=()
while getopts ":hi:e:d:pn:N:m:k:r:w:" option; do
    case $option in
        i) image=$OPTARG ;;
        e) engine=$OPTARG ;;
        d) folders+=("$(cd "$OPTARG" 2>/dev/null && pwd)") || fail "-d is $OPTARG; write a folder that exists" ;;
        p) print=yes ;;
        h) help ;;
        :) fail "-$OPTARG lacks its value; see $0 --help" ;;
        \?) fail "-$OPTARG is not an option of $0; see $0 --help" ;;
        *) options+=("-$option" "$OPTARG") ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || fail "no command; write $0 [-i IMAGE] [-n PROCESSES] COMMAND, such as train --config FILE"
[ "$PWD" != / ] || fail "the current folder is /, which cannot be mounted in a container; change to the folder of the run"
case $engine in
    "") for engine in docker podman apptainer none; do ! command -v "$engine" >/dev/null || break; done ;;
    docker | podman | apptainer)
        command -v "$engine" >/dev/null || fail "-e is $engine, which is not on PATH; leave -e out to use one that is"
        ;;
    *) fail "-e is $engine; write docker, podman or apptainer" ;;
esac
[ "$engine" != none ] || fail "no docker, podman or apptainer on PATH; install one, or use launch/torchrun.sh without a container"

cache=$HOME/.cache/inrank_dist
count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
if [ "$engine" = apptainer ]; then
    # apptainer runs as the user, with the home folder and environment of the host. These variables would break the image.
    unset INRANK_VENV PYTHONPATH PYTHONHOME
    command=(apptainer exec --pwd "$PWD" --bind "$cache")
    [ "$count" -eq 0 ] || command+=(--nv)
    for folder in "${folders[@]}"; do command+=(--bind "$folder"); done
    image=${image:-inrank_dist.sif}
else
    # --ipc host: NCCL and data loaders need more shared memory than containers have by default.
    # --stop-timeout: saving takes longer than the default of 10 s; the training exits after checkpoint.grace_seconds at most.
    command=("$engine" run --rm --network host --ipc host --stop-timeout 180 --workdir "$PWD")
    command+=(--volume "$cache:/home/inrank/.cache/inrank_dist")
    for folder in "${folders[@]}"; do command+=(--volume "$folder:$folder"); done
    if [ "$engine" = podman ]; then
        command+=(--security-opt label=disable) # otherwise SELinux blocks access to the folders
    fi
    if [ "$engine" = podman ] && [ "$(id -u)" != 0 ]; then
        command+=(--userns keep-id)
    fi
    command+=(--user "$(id -u):$(id -g)")
    if [ "$count" -gt 0 ] && [ "$engine" = docker ]; then
        command+=(--gpus all)
    elif [ "$count" -gt 0 ]; then
        command+=(--device nvidia.com/gpu=all)
    fi
    if [ -d /dev/infiniband ]; then
        command+=(--device /dev/infiniband --ulimit memlock=-1)
    fi
    for name in $(compgen -e); do
        case $name in
            INRANK_VENV) ;; # a path of the host
            NCCL_* | GLOO_* | INRANK_* | SLURM_* | TORCH_* | HF_TOKEN | OMP_NUM_THREADS | CUDA_VISIBLE_DEVICES)
                command+=(--env "$name")
                ;;
        esac
    done
    image=${image:-inrank_dist}
fi
command+=("$image" /inrank/launch/torchrun.sh "${options[@]}" "$@")
if [ "$print" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
mkdir -p "$cache" # otherwise the engine creates it, owned by root
exec "${command[@]}"
