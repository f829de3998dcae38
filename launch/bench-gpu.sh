#!/usr/bin/env bash
# Full rank against low rank on one GPU, in about two minutes: GPT-2 medium and a 1.3B shape, 16 sequences of 1024, bf16, eager
# and compiled; step time, MFU and peak memory with their ratios.
# Usage: launch/bench-gpu.sh [OPTIONS OF inrank bench speed], which override the ones here: launch/bench-gpu.sh --batch 4
# Uses the python3 on PATH if it has the required libraries (such as a cluster's own), else creates the environment.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=environment.sh
. "$root/launch/environment.sh"
case ${1:-} in -h | --help) help ;; esac
find_environment ""
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
echo "== Measuring; each table is shown when all its forms are compiled and timed"
# Defaults for options that were not given. inrank rejects an option that is given twice.
options=()
while read -r option value; do
    case " ${*%%=*} " in
    *" $option "*) ;;
    *) options+=("$option" "$value") ;;
    esac
done <<END
--models gpt2-medium,1.3b
--targets all
--seq 1024
--batch 16
--precision bf16
--forms 1,2,4,6,7,11
--rounds 5
END
exec python3 -m inrank_dist bench speed "${options[@]}" "$@"
