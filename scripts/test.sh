#!/usr/bin/env bash
# Installs what is missing and runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# Nothing of the default install may be fetched at run time.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
# Tests start several ranks on few cores; two spinning OpenMP teams on one core are many times slower than one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two processes; the tests of a file stay in one, as they share what they prepare.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
