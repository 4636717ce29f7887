#!/usr/bin/env bash
# The whole test suite in the project's environment: at most 15 minutes on 2 cores.
#
#   bash tools/run_tests.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
source .venv/bin/activate
ruff check .
ruff format --check .
# One process for each core, so each keeps to one thread.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
