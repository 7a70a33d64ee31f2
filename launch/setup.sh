#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv beside this folder, and installs the project into it with the extras named.
#   . launch/setup.sh plot
# Needs Python 3.11 or newer with venv, and a package index. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for PYTHON in ${PYTHON:-python3 python3.13 python3.12 python3.11} ''; do
  if [ -n "$PYTHON" ] && "$PYTHON" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    break
  fi
done
if [ -z "$PYTHON" ]; then
  echo 'error: no Python 3.11 or newer with venv found; install one, or set PYTHON to its path' >&2
  exit 1
fi

if [ ! -x .venv/bin/python ]; then
  echo "making .venv with $("$PYTHON" --version)"
  "$PYTHON" -m venv .venv
fi
wanted="$* $(cat setup.cfg pyproject.toml)"
if [ "$wanted" != "$(cat .venv/installed 2>/dev/null)" ]; then
  echo "installing loopformer[$*] into .venv (about 600 MB, a minute or two)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
  echo "$wanted" > .venv/installed
fi
