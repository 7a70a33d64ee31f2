#!/usr/bin/env bash
# From nothing to a trained looped model: installs, trains the tiny LoopFormer on real text, evaluates it with
# 1, 2, 4 and 8 loops from one checkpoint, and lets it write. Under ten minutes on two CPU cores.
#   bash launch/quickstart.sh [--set path=value ...]      (WORKDIR=runs/tiny names the folder; run again to resume)
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" plot
WORKDIR=${WORKDIR:-runs/tiny}
start=$SECONDS

main() { .venv/bin/python -m experiments.main --workdir="$WORKDIR" "$@"; }

main --config=experiments/configs/loopformer.py:tiny "$@"
main --mode=eval --depths=1,2,4,8
for budget in 1 8; do
  main --mode=generate --budget="$budget" --prompt='def __init__(self, ' --max_new_tokens=60 --temperature=0.7
done
echo "done in $((SECONDS - start)) s: $WORKDIR/eval/depths.csv, $WORKDIR/eval/depths.png, $WORKDIR/metrics.jsonl"
