#!/usr/bin/env bash
# Submits a training run to Slurm, after checking everything that can be checked before it waits in a queue.
# Usage: launch/slurm.sh --config FILE --run DIR [OPTIONS] [-- ARGUMENTS FOR train]
#   launch/slurm.sh --config my.yaml --run /data/my --partition gpu --nodes 2 --time 1-0 -- --parallel.engine zero2
#   launch/slurm.sh --config my.yaml --run /data/my --seeds 0-4     one run per seed, in /data/my/seed-0 and so on
#
#   --config FILE      configuration of the run
#   --run DIR          run folder, on storage that all nodes share, with logs in DIR/logs; an existing run is resumed
#   --partition P      default: the cluster's
#   --nodes N          default: 1
#   --gpus N           per node, with one process each; 0: the CPU, one process per node. Default: all GPUs of a node
#   --cpus N           cores per node. Default: whole nodes, with all their cores and memory
#   --time T           minutes, H:MM:SS or D-H; at the limit the job saves, is requeued, resumes. Default: the partition's
#   --signal SECONDS   how long before the limit it is asked to save (default: 180; more than checkpoint.grace_seconds)
#   --account A        account to charge
#   --seeds LIST       such as 0-4, 1,3 or 0-9%2 (two at a time)
#   --image IMAGE      train in a container: a .sqsh file or REGISTRY#NAME with pyxis, a .sif file with apptainer
#   --mounts A,B       additional folders for the container, such as that of the data
#   --no-check         do not check the nodes before the training
#   --sbatch ARGUMENT  an additional argument for sbatch, such as --sbatch --qos=high (may be repeated)
#   --dry-run          print the sbatch command and submit nothing; with --gpus also where Slurm does not answer
# What the job does at its time limit and when something fails: launch/slurm.sbatch --help
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=environment.sh
. "$root/launch/environment.sh"

config='' run='' partition='' nodes=1 gpus='' cpus='' time='' signal=180
account='' seeds='' image='' mounts='' dry_run=''
job=() extra=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) help ;;
        --config | --run | --partition | --nodes | --gpus | --cpus | --time | --signal | --account | --seeds | \
            --image | --mounts | --sbatch)
            [ $# -gt 1 ] || fail "$1 lacks its value; see launch/slurm.sh --help"
            if [ "$1" = --sbatch ]; then extra+=("$2"); else printf -v "${1#--}" %s "$2"; fi
            shift
            ;;
        --no-check) job+=("$1") ;;
        --dry-run) dry_run=yes ;;
        --) shift && break ;;
        *) fail "$1 is not an option of launch/slurm.sh; see --help; write arguments for train after --" ;;
    esac
    shift
done

[ -n "$config" ] || fail "--config is missing; write --config FILE"
[ -f "$config" ] || fail "--config is $config, which is not a file; write the configuration of the run"
[ -n "$run" ] || fail "--run is missing; write --run DIR, a folder on storage that all nodes share"
whole() { # OPTION VALUE LEAST
    { [[ $2 =~ ^[0-9]{1,6}$ ]] && [ "$2" -ge "$3" ]; } || fail "$1 is $2; write a whole number of at least $3"
}
whole --nodes "$nodes" 1
whole --signal "$signal" 1
[ -z "$gpus" ] || whole --gpus "$gpus" 0
[ -z "$cpus" ] || whole --cpus "$cpus" 1
[[ -z $time || $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
    fail "--time is $time; write minutes, H:MM:SS or D-H, such as 90, 1:30:00 or 2-0"
[[ -z $seeds || $seeds =~ ^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*(%[1-9][0-9]*)?$ ]] ||
    fail "--seeds is $seeds; write a list such as 0-4, 1,3 or 0-9%2"
[[ ! $image =~ ^[./]|\.(sif|sqsh)$ || -e $image ]] ||
    fail "--image is $image, which does not exist; write a .sif or .sqsh file, or a name that the container engine knows"

no_slurm='' advice="run this on a login node of a Slurm cluster"
[ -z "$dry_run" ] || advice="write --gpus N as well, and --dry-run needs no Slurm"
if ! command -v sbatch sinfo >/dev/null; then
    no_slurm="there is no sbatch on PATH"
elif ! partitions=$(sinfo --noheader --format %P 2>&1); then
    no_slurm="Slurm does not answer: $(tail -n 1 <<<"$partitions")"
fi
if [ -z "$no_slurm" ]; then
    partition=${partition:-$(sed -n 's/\*$//p' <<<"$partitions" | head -n 1)}
    partitions=$(tr -d '*' <<<"$partitions" | sort -u | paste -sd ' ')
    [ -n "$partition" ] || fail "this cluster has no default partition; write --partition with one of: $partitions"
    [[ " $partitions " == *" $partition "* ]] ||
        fail "there is no partition $partition; write --partition with one of: $partitions"
    most=$(($(sinfo --noheader --partition "$partition" --format %D | paste -sd +)))
    [ "$nodes" -le "$most" ] || fail "--nodes is $nodes, but partition $partition has $most; write at most that"
    if [ -z "$gpus" ]; then # the minimum over the partition's nodes; gpu:h100:8(S:0-1) means 8
        gpus=$(sinfo --noheader --partition "$partition" --format %G |
            sed -n 's/.*gpu:\([^,(]*:\)\{0,1\}\([0-9]*\).*/\2/p; t; s/.*/0/p' | sort -n | head -n 1)
    fi
elif [ -z "$dry_run" ] || [ -z "$gpus" ]; then
    fail "$no_slurm; $advice"
fi

submit=(sbatch --parsable --job-name "$(basename "$run")" --nodes "$nodes" --signal "B:USR1@$signal")
[ -z "$partition" ] || submit+=(--partition "$partition")
[ "$gpus" = 0 ] || submit+=(--gpus-per-node "$gpus")
if [ -n "$cpus" ]; then submit+=(--cpus-per-task "$cpus"); else submit+=(--exclusive --mem 0); fi
[ -z "$time" ] || submit+=(--time "$time")
[ -z "$account" ] || submit+=(--account "$account")
[ -z "$seeds" ] || submit+=(--array "$seeds")
log=$run/logs/%j.log
[ -z "$seeds" ] || log=$run/logs/%A_%a.log
submit+=(--output "$log" "${extra[@]}" "$root/launch/slurm.sbatch" --config "$config" --run "$run" --gpus "$gpus")
[ -z "$image" ] || submit+=(--image "$image")
[ -z "$mounts" ] || submit+=(--mounts "$mounts")
submit+=("${job[@]}")
[ $# -eq 0 ] || submit+=(-- "$@")

if [ -n "$dry_run" ]; then
    printf '%q ' "${submit[@]}" && echo
    exit
fi
mkdir -p "$run/logs" 2>/dev/null || fail "--run is $run, which cannot be created; write a folder that can be written"
export INRANK_ROOT=$root
id=$("${submit[@]}" 2>&1) || fail "sbatch refused: $(paste -sd ' ' <<<"${id//sbatch: error: /}")"
id=$(tail -n 1 <<<"$id") # a site may print messages before it
id=${id%%;*}             # the name of the cluster may follow
echo "job $id: $nodes nodes of partition $partition, $gpus GPUs each"
echo "follow: tail -F $run/logs/$id*.log"
echo "save and stop: scancel --batch --signal TERM $id"
echo "resume: the same command"
