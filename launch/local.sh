#!/usr/bin/env bash
# One run in several processes of this machine, on CPU devices: what a cluster does, to try and test it on a laptop.
#   launch/local.sh [--dry-run] PROCESSES [--devices=N] -- ARGUMENTS
# Every process has N devices (1 by default). The arguments go to experiments.main; --workdir= must be among them.
# Process 0 writes to the terminal, the others to WORKDIR/logs/process-N.log (build/logs/, where WORKDIR is in a
# bucket). SIGTERM and Ctrl-C reach all of them (they
# save, and the same command resumes). When one fails, the others are killed, and the script ends with its status.
# --dry-run prints the commands. PYTHON names the interpreter, .venv/bin/python by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

dry_run='' processes='' devices=1 workdir=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --devices=*) devices=${1#*=} ;;
    [1-9]*) processes=$1 ;;
    *) usage "unknown argument: $1" ;;
  esac
  shift
done
[ $# -gt 0 ] || usage 'there is no --, after which the arguments of experiments.main come'
shift
[ -n "$processes" ] || usage 'the number of processes is missing'
for word in "$@"; do
  case $word in --workdir=*) workdir=${word#*=} ;; esac
done
[ -n "$workdir" ] || usage '--workdir=FOLDER is missing among the arguments of experiments.main'

# A port that nothing answers at, below those that the system hands out by itself.
port=$((RANDOM % 16384 + 16384))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  port=$((RANDOM % 16384 + 16384))
done

# The command of process $1.
command_of() {
  command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port" "$flags"
    "${PYTHON:-.venv/bin/python}" -m experiments.main "--coordinator=127.0.0.1:$port" "--processes=$processes"
    "--process=$1" "${arguments[@]}")
}

flags=$(launch/flags.sh cpu)
arguments=("$@")
if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i"
    quoted "${command[@]}"
  done
  exit
fi

running=()
pass_on() { [ ${#running[@]} = 0 ] || kill "-$1" "${running[@]}" 2>/dev/null || true; }
trap 'pass_on TERM' TERM INT
trap 'pass_on KILL; wait' EXIT
logs=$workdir/logs
case $workdir in *://*) logs=build/logs ;; esac
mkdir -p "$logs"
for ((i = 0; i < processes; i++)); do
  command_of "$i"
  if [ "$i" = 0 ]; then
    "${command[@]}" &
  else
    "${command[@]}" >> "$logs/process-$i.log" 2>&1 &
  fi
  running[i]=$!
done

while [ ${#running[@]} -gt 0 ]; do
  sleep 0.2 || true  # Ctrl-C ends it too
  for i in "${!running[@]}"; do
    if ! kill -0 "${running[i]}" 2>/dev/null; then
      status=0
      wait "${running[i]}" || status=$?
      unset "running[i]"
      if [ "$status" != 0 ]; then
        echo "error: process $i failed with status $status; the other processes are killed" >&2
        [ "$i" = 0 ] || tail -n 5 "$logs/process-$i.log" >&2
        exit "$status"
      fi
    fi
  done
done
