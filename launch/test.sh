#!/usr/bin/env bash
# Installs, and runs the test suite; arguments go to pytest.
# shellcheck source=launch/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
exec .venv/bin/python -m pytest "$@"
