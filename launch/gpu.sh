#!/usr/bin/env bash
# Benchmarks one GPU in about 12 minutes, without downloading anything. Each part writes its result when done.
# Usage: launch/gpu.sh [--out FOLDER] [--parts parity,speed,study] [--data FOLDER] [--toy]
#   parity  every engine, precision and mode against the CPU (inrank bench parity): parity.txt, parity.json
#   speed   full rank against low rank (launch/bench-gpu.sh): speed.txt, speed.json
#   study   dense AdamW, dense Muon, LoRA-Muon at low rank, growing and wider, at equal tokens and equal FLOPs: study.txt, study/study.html.
#           Text: FOLDER/train/**/*.txt, validated on FOLDER/valid/**/*.txt; without --data the source of Python's own library
#   --toy   the same with small shapes, which takes minutes on a CPU
# Uses the python3 on PATH if it has the required libraries, else creates the environment.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=environment.sh
. "$root/launch/environment.sh"

out=gpu parts=parity,speed,study data='' toy=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) help ;;
        --toy) toy=yes ;;
        --out | --parts | --data)
            [ $# -gt 1 ] || fail "$1 lacks its value; see $0 --help"
            declare "${1#--}=$2"
            shift
            ;;
        *) fail "$1 is not an option of $0; see $0 --help" ;;
    esac
    shift
done
for part in ${parts//,/ }; do
    case $part in parity | speed | study) ;; *) fail "--parts has $part; write some of parity,speed,study" ;; esac
done
if [ "$data" ]; then
    [ -d "$data/train" ] && [ -d "$data/valid" ] || fail "--data is $data; write a folder with train and valid below it"
    data=$(cd "$data" && pwd)
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
find_environment deepspeed
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

part() { # NAME COMMAND ARGUMENTS...
    echo "== $1"
    local start=$SECONDS status=0
    "${@:2}" >"$out/$1.txt" 2>&1 || status=$?
    tail -n 40 "$out/$1.txt"
    echo "== $1: status $status after $((SECONDS - start)) s; $out/$1.txt"
    [ "$status" = 0 ] || failed=1
}

# shellcheck disable=SC2329  # called by part
study() {
    local settings="run: {seed: 0}
model: {name: gpt2, num_layers: 8, num_heads: 8, hidden_size: 512, max_seq_len: 512}
train: {steps: 250, global_batch_size: 32, micro_batch_size: 32, precision: bf16}
lowrank: {targets: [inner], interval: 20, warmup_steps: 80, initial_rank: 32, buffer: 32, multiple_of: 8}
tokenizer: {vocab_size: 8192}
eval: {interval: 200, batches: 8, sample_tokens: 0}"
    local wide="model.hidden_size: 768, model.num_heads: 12" rank=128
    if [ "$toy" ]; then
        settings="run: {seed: 0}
model: {name: gpt2, num_layers: 2, num_heads: 2, hidden_size: 32, max_seq_len: 32}
train: {steps: 16, global_batch_size: 8, micro_batch_size: 8}
lowrank: {targets: [inner], interval: 4, warmup_steps: 8, initial_rank: 2, buffer: 2, multiple_of: 1}
tokenizer: {vocab_size: 512}
eval: {interval: 8, batches: 1, sample_tokens: 0}"
        wide="model.hidden_size: 48" rank=8
    fi
    settings+="
optimizer: {lr: 6.0e-3}
schedule: {name: cosine, warmup_steps: 4, min_lr_ratio: 0.1}
checkpoint: {interval: 0}
log: {interval: 10}"
    if [ "$data" ]; then
        settings+="
data: {source: files, paths: ['$data/train/**/*.txt'], validation_paths: ['$data/valid/**/*.txt'], cache_dir: '$out/cache'}"
    else
        settings+="
data: {source: stdlib, cache_dir: '$out/cache', max_bytes: $([ "$toy" ] && echo 400000 || echo null)}"
    fi
    echo "$settings" >"$out/base.yaml"
    local fixed="lowrank.mode: fixed, lowrank.base: none, lowrank.init: spectral, lowrank.initial_rank: $rank"
    cat >"$out/gpu-study.yaml" <<END
base: base.yaml
dir: $out/study
seeds: [0]
budget: {flops: control}
variants:
  AdamW dense:
    settings: {lowrank.mode: full, optimizer.lr: 1.0e-3}
  Muon dense:
    control: AdamW dense
    settings: {lowrank.mode: full, optimizer.name: muon}
  Muon dense, crossing:
    control: Muon dense
    settings: {lowrank.mode: full, optimizer.name: muon, model.layer_crossing: true}
  LoRA-Muon, crossing, fixed rank:
    control: Muon dense, crossing
    settings: {optimizer.name: lora_muon, model.layer_crossing: true, $fixed}
  LoRA-Muon, crossing, InRank:
    control: Muon dense, crossing
    settings: {optimizer.name: lora_muon, model.layer_crossing: true}
  LoRA-Muon, crossing, fixed rank, wider:
    control: Muon dense, crossing
    settings: {optimizer.name: lora_muon, model.layer_crossing: true, $fixed, $wide}
END
    python3 -m inrank_dist study "$out/gpu-study.yaml"
}

for part in ${parts//,/ }; do
    case $part in
        parity)
            only=()
            [ -z "$toy" ] || only=(--only "local,fsdp,bf16")
            workers=$(($(nproc) / 3))
            [ "$workers" -lt 5 ] || workers=5
            part parity python3 -m inrank_dist bench parity --workers "$((workers > 1 ? workers : 1))" --json "$out/parity.json" "${only[@]}"
            ;;
        speed)
            small=()
            [ -z "$toy" ] || small=(--models "" --widths 64 --vocab 320 --seq 16 --batch 1 --rounds 1)
            part speed "$root/launch/bench-gpu.sh" --json "$out/speed.json" "${small[@]}"
            ;;
        study) part study study ;;
    esac
done
exit "$failed"
