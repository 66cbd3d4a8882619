#!/usr/bin/env bash
# From nothing to a report: installs into .venv, prepares real text, trains full attention and MoBA through the deepspeed CLI,
# evaluates both on held-out long documents, draws. Run again it reuses what is done; interrupted, it goes on.
# Arguments are overrides of both training runs, such as stages.0.tokens=2e6.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec .venv/bin/python -m scripts.quickstart "$@"
