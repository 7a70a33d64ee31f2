#!/usr/bin/env bash
# What tpu_pod.sh has done on every host of a slice, in the copy of the repository there.
#   launch/tpu_host.sh setup [COMMAND]           installs into .venv, with libtpu; then runs COMMAND (a mount)
#   launch/tpu_host.sh run BACKEND ARGUMENTS     stops what still runs, then runs launch/run.sh; run.pid names it
#   launch/tpu_host.sh stop                      SIGTERM, and SIGKILL to what has not ended two minutes later
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup() {
  # The hosts' own Python may be too old: uv brings one that is not.
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  PYTHON=$(python3 -m uv python find 3.12) bash launch/setup.sh gcs
  .venv/bin/python -m pip install --quiet 'jax[tpu]'
  [ $# = 0 ] || bash -c "$1"
}

# A run whose connection was lost goes on here, and holds the chips.
stop() {
  local pid
  [ -f run.pid ] || return 0
  pid=$(cat run.pid)
  if kill -TERM "$pid" 2>/dev/null; then
    timeout 120 tail --pid="$pid" -f /dev/null || kill -KILL -- "-$pid"
  fi
  rm -f run.pid
}

run() {
  stop
  # A session of its own: its number names all its processes.
  exec setsid --wait bash -c 'echo $$ > run.pid; exec launch/run.sh "$@"' run.sh "$@"
}

case ${1:-} in
  setup | run | stop) "$@" ;;
  *) echo 'error: tpu_host.sh: choose from setup, run, stop' >&2; exit 2 ;;
esac
