#!/usr/bin/env bash
# The second command: makes the environment with the test tools and runs the tests. Words after the script's name are
# passed to pytest: launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment dev

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "== Running the tests"
exec python -m pytest "$@"
