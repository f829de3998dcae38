# shellcheck shell=bash
# Sourced by the scripts in this folder. Usage: . launch/environment.sh, and then
#   make_environment EXTRA   creates .venv with the project installed; reinstalls only when pyproject.toml changes (EXTRA: ""
#                            or a list such as dev)
#   find_environment EXTRA   uses the python3 on PATH if it has the libraries, else creates .venv
#   use_environment          uses .venv if it exists, else whatever is on PATH, such as a cluster's own Python
#   help, fail MESSAGE       prints the script's --help; prints an error and exits with status 2

# The comment at the top of the calling script.
help() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
    exit 0
}

fail() {
    echo "error: $*" >&2
    exit 2
}

make_environment() {
    local extra=$1 python venv stamp wanted
    venv=${INRANK_VENV:-.venv}
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3 python}; do
        command -v "$python" >/dev/null 2>&1 || continue
        "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null && break
        python=
    done
    command -v "${python:-none}" >/dev/null 2>&1 || fail "no Python 3.10 or newer found; install one, or write PYTHON=/path/to/python3 $0"
    stamp=$venv/.installed${extra:+-$extra}
    wanted=$(cksum <pyproject.toml)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== Making the environment in $venv (PyTorch and a few libraries; the first time takes a minute or more)"
        "$python" -m venv "$venv" || fail "$python cannot create a virtual environment; install its venv module (Debian: apt-get install python3-venv)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" ||
            fail "pip could not install the project; see its output above"
        echo "$wanted" >"$stamp"
    fi
    PATH=$(cd "$venv/bin" && pwd):$PATH
    export PATH
}

# Use the python3 on PATH if it has the required libraries, such as a cluster's own; else the project's .venv, created if needed.
find_environment() {
    local root
    python3 -c 'import datasets, filelock, numpy, psutil, pyarrow, rich, safetensors, sentencepiece, tensorboard, torch, yaml' 2>/dev/null && return
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    pushd "$root" >/dev/null || return
    make_environment "$1"
    popd >/dev/null || return
}

use_environment() {
    local root venv
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=${INRANK_VENV:-$root/.venv}
    if [ -d "$venv/bin" ]; then
        PATH=$(cd "$venv/bin" && pwd):$PATH
        export PATH
    fi
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # works from any folder, without installing the project
    python -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "psutil"))))' 2>/dev/null ||
        fail "no Python with the project's libraries on PATH or in $venv; run launch/quickstart.sh once, or pip install -e $root"
}
