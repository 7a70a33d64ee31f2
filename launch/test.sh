#!/usr/bin/env bash
# Installs, and runs the test suite; arguments go to pytest.
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
# A file's tests stay in one worker, where they share what they compiled; tests/conftest.py says in which order.
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
