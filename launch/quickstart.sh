#!/usr/bin/env bash
# From nothing to two trained looped models, and a picture of what loops buy: installs, trains a small LoopFormer on real
# text and another on a reasoning task (jumps along pointers), evaluates each with 1, 2, 4 and 8 loops from one checkpoint,
# and lets the first write. Says in advance how long it will take: ten minutes on two quiet CPU cores.
#   bash launch/quickstart.sh [--set path=value ...]      (WORKDIR=runs/tiny names the folder; run again to resume)
# The second run is in WORKDIR-pointers. --set changes both runs, so it names fields that both have. The picture is
# WORKDIR/eval/dial.png.
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" plot
WORKDIR=${WORKDIR:-runs/tiny}
WORKDIR=${WORKDIR%/}
REASONING=$WORKDIR-pointers
start=$SECONDS
trap 'exit 130' INT  # a run that Ctrl-C reaches saves, and ends as if it were ready

main() { .venv/bin/python -m experiments.main "$@"; }
both() { .venv/bin/python -m experiments.tools.quickstart --workdir="$WORKDIR" --reasoning="$REASONING" "$@"; }

both --mode=train "$@"
main --workdir="$WORKDIR" --config=experiments/configs/quickstart.py:text "$@"
main --workdir="$REASONING" --config=experiments/configs/quickstart.py:pointers "$@"
for folder in "$WORKDIR" "$REASONING"; do
  main --workdir="$folder" --mode=eval --depths=1,2,4,8
done
for budget in 1 8; do
  main --workdir="$WORKDIR" --mode=generate --budget="$budget" --prompt='def __init__(self, ' --max_new_tokens=60 \
    --temperature=0.7
done
echo "done in $((SECONDS - start)) s: $WORKDIR/eval/, $REASONING/eval/, and metrics.jsonl in both folders"
both --mode=eval
