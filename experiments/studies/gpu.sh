#!/usr/bin/env bash
# The experiments on reasoning at the size of one GPU, of many runs each, of some minutes on a fast one (expected, not
# measured). What was trained stands in RUNS: the same command goes on where it was stopped. Tables and pictures go to
# OUT, but for `fillers`, whose evaluations stay in RUNS. Both folders are relative to the checkout.
#   bash experiments/studies/gpu.sh RUNS OUT [NAME...]
# NAME: of those below, all by default. PYTHON names another interpreter, SET further settings, apart by spaces
# ("train.steps=100 optim.schedule.warmup=5").
set -uo pipefail
trap 'exit 130' INT  # a run that Ctrl-C reaches saves, and ends as if it were ready
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
runs=${1:?RUNS: a folder for what is trained} out=${2:?OUT: a folder for tables and pictures}
shift 2
settings=()
for one in ${SET:-}; do settings+=("--set=$one"); done
names=(relay padded fillers words connectivity)
[ $# -gt 0 ] || set -- "${names[@]}"

# study NAME MODULE ARGUMENTS...: a study at its larger size, and its status if it fails.
study() {
  local name=$1 module=$2
  shift 2
  "$python" -m "experiments.studies.$module" "$@" ${settings[@]+"${settings[@]}"} --workdir="$runs/$name" --out="$out/$name" ||
    { echo "gpu.sh: $name ended with status $?" >&2; failed=1; }
}

failed=0
for name in "$@"; do
  case $name in
    relay)  # a loop teaches a decoder, arithmetic mod 11: tested on 7 to 10 operators
      study relay relay_stages --size=gpu --inject ;;
    padded)  # words of A5, of 4 to 64: loops that grow with the logarithm
      study padded padded_depth --size=gpu --task=a5 ;;
    fillers)  # paths in graphs of eight vertices, by loops and fillers
      for fillers in 0 64 512; do
        for loops in 1 2 3 4; do
          folder=$runs/fillers-$fillers-$loops  # evaluated by distances, in the folder eval there
          "$python" -m experiments.main ${settings[@]+"${settings[@]}"} --workdir="$folder" \
            --config="experiments/configs/padded.py:gpu,task=connectivity,fillers=$fillers,loops=$loops" &&
            "$python" -m experiments.main --mode=eval --workdir="$folder" --depths="$loops" ||
            { echo "gpu.sh: fillers=$fillers, loops=$loops ended with status $?" >&2; failed=1; }
        done
      done ;;
    words)  # products of 32 permutations of five: chains against loops
      study words cot_or_loop --size=gpu --on=word \
        --arms=chain-4,chain-8,chain-16,chain-32,loop-1-inject,loop-2-inject,loop-4-inject,loop-8-inject ;;
    connectivity)  # graphs of 16 vertices
      study connectivity cot_or_loop --size=gpu --on=connectivity --arms=chain-0,chain-16,loop-4-inject,loop-8-inject ;;
    *) echo "gpu.sh: $name: choose from ${names[*]}" >&2; failed=1 ;;
  esac
done
exit $failed
