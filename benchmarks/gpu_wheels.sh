#!/usr/bin/env bash
# Wheels that a GPU box without a network may lack, into FOLDER (about 8 MB), for Python 3.12 on Linux x86-64 with CUDA 13:
# bitsandbytes with its CUDA 13.0 library alone, and the packages that benchmarks compare with.
set -euo pipefail
folder=${1:?usage: gpu_wheels.sh FOLDER [PYTHON]}
python=${2:-python3}
mkdir -p "$folder"
rm -f "$folder"/*.whl
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --abi cp312 --abi abi3 --abi none "${platforms[@]}" --platform any -d "$folder" \
  bitsandbytes==0.50.2 liger-kernel==0.8.5 torch-fps==0.6.0 torch-quickfps-cu130==2.1.0
"$python" - "$folder" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("bitsandbytes-*.whl")
kept = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")  # of a library for each CUDA version, 60 MB in all
smaller = wheel.with_suffix(".new")
with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
    for member in source.infolist():
        name = Path(member.filename).name
        if name in kept or not (name.startswith("libbitsandbytes_") and name.endswith(".so")):
            target.writestr(member, source.read(member))
smaller.replace(wheel)
PYTHON
