#!/usr/bin/env bash
# Installs what is missing, checks style and types, runs the tests that need no GPU.
# `bash tests/run.sh all` runs the long ones, too: real runs whose parts are killed one after another, nodes that come and go.
# Other arguments go to pytest.
# `bash tests/run.sh chaos [--kills N] [--real N] [--seed N]` instead kills processes of running jobs for about ten minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash cluster/install.sh --dev --quiet
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
bin=${RAYSYS_VENV:-.venv}/bin
if [ "${1:-}" = chaos ]; then
    exec "$bin/python" -u -m tests.chaos.storm "${@:2}"
fi
"$bin/ruff" check raysys jobs tests
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$bin/pyright"
case ${1:-} in
    "") set -- -m "not long" ;;
    all) shift ;;
esac
exec "$bin/python" -m pytest -q "$@"
