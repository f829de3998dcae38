# shellcheck shell=bash
# Sourced by the launchers beside it: finds the environment, reads -n, counts the GPUs that may be used.
# Sets processes, the array words, and the array gpus: the numbers of the GPUs, empty for the CPU.

# shellcheck source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

parse_words() {
    local count
    processes=
    [ "${1:-}" != --help ] || help
    while getopts ":hn:" option "$@"; do
        case $option in
            n) processes=$OPTARG ;;
            h) help ;;
            :) fail "-$OPTARG lacks its value; write -n PROCESSES" ;;
            *) fail "-$OPTARG is no option of $0; write -n PROCESSES, or see $0 --help" ;;
        esac
    done
    shift $((OPTIND - 1))
    [ $# -gt 0 ] || fail "no command; write $0 [-n PROCESSES] COMMAND, such as train --config FILE"
    # shellcheck disable=SC2034  # for the script that sources this
    words=("$@")
    use_environment
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    else
        count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
        mapfile -t gpus < <(seq 0 $((count - 1)))
    fi
    processes=${processes:-$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1))}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "-n is $processes; write a number of processes of at least 1"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

help() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
}
