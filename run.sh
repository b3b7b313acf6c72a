#!/usr/bin/env bash
# Set up .venv, then run the main job on a laptop, or the tests:
#   ./run.sh laptop [--section.field value ...]     ./run.sh test [pytest arguments]     ./run.sh setup
#   ./run.sh libero     installs LIBERO too (0.3 GB to download, 1 GB on disk; without its assets)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

setup() {
    local python=${PYTHON:-python3.11} stamp wanted
    if [ ! -x .venv/bin/python ]; then
        command -v "$python" > /dev/null || {
            echo "Python 3.11 is needed, and '$python' is not there; install it, or name it: PYTHON=/path/to/python3.11 $0" >&2
            exit 2
        }
        "$python" -m venv .venv
    fi
    wanted=$(cat requirements.lock pyproject.toml | sha256sum)
    stamp=.venv/installed.sha256
    [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ] && return
    .venv/bin/python -m pip install --quiet --no-deps -r requirements.lock
    .venv/bin/python -c "import torch" 2> /dev/null || {
        # where pip is offered a CUDA build only, its libraries are missing: the lock leaves these gigabytes out
        echo "torch does not load. Install the CPU build of torch 2.13.0 into .venv, as https://pytorch.org/get-started/locally/" \
            "says (choose Pip and CPU), with .venv/bin/python -m pip; then run $0 again." >&2
        exit 2
    }
    .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
    echo "$wanted" > "$stamp"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    setup)
        setup
        ;;
    libero)
        setup
        .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -r requirements-libero.lock
        ;;
    laptop)
        setup
        # each finding that is not ok names its fix; the run stops by itself where it cannot do without
        .venv/bin/vlarl doctor || true
        exec .venv/bin/vlarl train jobs/laptop.yaml "$@"
        ;;
    test)
        setup
        exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
        ;;
    *)
        echo "usage: $0 laptop [--section.field value ...] | test [pytest arguments] | setup | libero" >&2
        exit 2
        ;;
esac
