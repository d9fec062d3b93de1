#!/usr/bin/env bash
# One command: installs what is missing, starts a local Ray head (or uses RAY_ADDRESS), submits a job and follows it.
#   bash cluster/quickstart.sh [job] [--config FILE] [key=value ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$here/cluster/install.sh" --quiet
exec "$here/.venv/bin/python" -m raysys.submit "$@"
