#!/usr/bin/env bash
# The tables of one GPU, for docs/performance.md, in under eight minutes: every suite has a time limit, and writes its
# table when it ends. Needs JAX with CUDA, and for the peers PyTorch with CUDA and transformers.
#   bash experiments/benchmark/gpu.sh [OUT]
# OUT: where the tables go, experiments/reports/benchmark/CARD by default. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
out=${1:-experiments/reports/benchmark/${card:?no GPU is found by nvidia-smi}}
peer=()
"$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null && peer=(--peer=torch)

# limited SECONDS FOLDER ARGUMENTS...: a suite, and what is said if it takes longer.
limited() {
  local seconds=$1 folder=$2
  shift 2
  timeout "$seconds" "$python" -m experiments.benchmark "$@" --out="$folder" ||
    echo "note: --suite of '$*' ended with status $? within its $seconds s; its table is not written" >&2
}

limited 90 "$out" --suite=decode --repeats=3
limited 150 "$out/small" --suite=train --size=small --repeats=3 ${peer[@]+"${peer[@]}"}
limited 130 "$out/paper" --suite=train --size=paper --repeats=3
"$python" -c 'import torch, transformers' 2>/dev/null &&
  limited 100 "$out/imported" --suite=decode --peer=transformers --repeats=3
