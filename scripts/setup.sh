#!/usr/bin/env bash
# Makes .venv in the repository root and installs requirements.txt into it; does nothing where that is done already.
# PYTHON=python3.12 bash scripts/setup.sh chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python: Python 3.11 or newer is needed; PYTHON=/path/to/python bash $0 chooses another" >&2
    exit 2
fi

# The mark is written last, so an install that was cut short is taken up again.
mark=.venv/installed
wanted=$("$python" -V; cksum <requirements.txt)
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$wanted" ]; then
    exit 0
fi
echo "installing requirements.txt into .venv (a minute or two)" >&2
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
echo "$wanted" >"$mark"
