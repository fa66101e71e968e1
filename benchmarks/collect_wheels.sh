#!/usr/bin/env bash
# Collects the wheels that a machine with only torch, triton, numpy, pyarrow, safetensors, rich, pillow and jinja2 lacks
# for this project: a machine without a package index installs them from the folder.
#
#   benchmarks/collect_wheels.sh [FOLDER=.whl] [PYTHON_VERSION=3.12] [--peers] [--low-bit]
#
# --peers adds what the kernel benchmarks are timed against (liger-kernel, cut-cross-entropy, fla-core), --low-bit the
# moments in 8 bits (torchao). To install:
#   python3 -m pip install --no-index --no-deps --upgrade --target SITE FOLDER/*.whl && export PYTHONPATH=SITE
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.whl version=3.12 peers= low_bit=
for argument in "$@"; do
  case $argument in
    --peers) peers=yes ;;
    --low-bit) low_bit=yes ;;
    -*)
      echo "benchmarks/collect_wheels.sh: unknown flag $argument" >&2
      exit 2
      ;;
    [0-9]*) version=$argument ;;
    *) folder=$argument ;;
  esac
done
# Their needs are named too: --no-deps keeps torch and its gigabytes out.
wanted="pydantic==2.14.3 annotated-types typing-inspection typing-extensions tomli==2.5.0 tomli-w==1.2.0 torchdata==0.11.0 lpips==0.1.4"
if [ -n "$peers" ]; then
  wanted+=" liger-kernel==0.8.5 cut-cross-entropy==25.1.1 fla-core==0.6.0 einops"
fi
if [ -n "$low_bit" ]; then
  wanted+=" torchao==0.18.0"
fi
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${name}_x86_64")
done
download() {
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "$version" "${platforms[@]}" --dest "$folder" "$@"
}
mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of a package would stop the whole install
# shellcheck disable=SC2086
download $wanted
# pydantic works with one pydantic-core alone, which it names.
core=$(unzip -p "$folder"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: \(pydantic-core==[0-9.]*\).*/\1/p')
download "$core"
du -ch "$folder"/*.whl
