#!/usr/bin/env bash
# The second command to run: creates the environment with the test tools and runs the tests, on up to four cores. Arguments
# are passed to pytest: launch/test.sh -m slow; launch/test.sh -n 0 tests/test_config.py
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment dev

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "== Running the tests"
exec python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup "$@"
