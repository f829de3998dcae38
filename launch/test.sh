#!/usr/bin/env bash
# The second command to run: creates the environment with the test tools and runs the tests, on up to four cores.
# Usage: launch/test.sh [ARGUMENTS FOR pytest], for example launch/test.sh -m slow; launch/test.sh -n 0 tests/test_config.py
set -euo pipefail
# shellcheck source=environment.sh
. "$(dirname "$0")/environment.sh"
case ${1:-} in -h | --help) help ;; esac
cd "$(dirname "$0")/.."
make_environment dev

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "== Running the tests"
exec python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup "$@"
