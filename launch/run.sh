#!/usr/bin/env bash
# One process of a run, as the cluster scripts start it: experiments.main under the compiler flags of a backend.
#   launch/run.sh BACKEND ARGUMENTS      (a backend of launch/flags.sh; the arguments go to experiments.main)
# SIGTERM is passed on. The program then saves and ends with 0, just as when it has finished; to a scheduler the two are
# not the same, so this script ends with 75 (EX_TEMPFAIL: try again) after a signal, and else as the program does.
# PYTHON names the interpreter, .venv/bin/python by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
flags=$(launch/flags.sh "${1:-}")
export "${flags?}"
shift

stopped=''
child=''
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
"${PYTHON:-.venv/bin/python}" -m experiments.main "$@" &
child=$!
[ -z "$stopped" ] || kill -TERM "$child"  # the signal came before there was a child
while kill -0 "$child" 2>/dev/null; do
  wait "$child" || true  # a signal ends the wait, not the child
done
status=0
wait "$child" || status=$?
case $status in
  0 | 130 | 143) [ -z "$stopped" ] || status=75 ;;  # 130, 143: the signal came before the first step
esac
exit "$status"
