#!/usr/bin/env bash
# `make gpu-rehearsal`: what benchmarks/gpu_suite.py will do on a GPU box, in small on this CPU under the box's versions.
# Fills gpu_wheels/ with what travels; leaves the project's own environment and its native library alone.
#
#     gpu_rehearsal.sh PYTHON VENV      PYTHON is a Python 3.12, used where the environment VENV does not exist yet
set -euo pipefail
cd "$(dirname "$0")/.."
interpreter=${1:?usage: gpu_rehearsal.sh PYTHON VENV} venv=${2:?usage: gpu_rehearsal.sh PYTHON VENV}
work=$PWD/build/gpu carried=$PWD/gpu_wheels largest_mib=64
export TRITON_CACHE_DIR=/tmp/pointalign-triton  # as in the command of gpu_suite.py: the cache holds absolute paths
export CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

step "environment $venv"
if [ ! -x "$venv/bin/python" ]; then
  [ -n "$interpreter" ] && "$interpreter" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
    { echo "no Python 3.12 on PATH or below ~/.pyenv: give one by make gpu-rehearsal PYTHON312=..." >&2; exit 1; }
  "$interpreter" -m venv "$venv"
  # Only what a box made for PyTorch has: a stage that imports more fails here, not there.
  "$venv/bin/python" -m pip install -q -c constraints-gpu.txt torch triton transformers peft accelerate numpy scipy \
    pillow matplotlib tensorboard pytest pytest-xdist pytest-benchmark hypothesis sacrebleu "setuptools>=77" wheel
fi
venv=$(cd "$venv" && pwd) python=$venv/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "$venv is not of Python 3.12" >&2; exit 1; }

step "the tree that travels, as $work/tree"
rm -rf "$work"
mkdir -p "$work/tree" "$carried"
git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'ls -d "$@" 2>/dev/null || true' sh |
  tar -cf - -T - | tar -xf - -C "$work/tree"
tree=$work/tree

step "wheels, installed as there"
benchmarks/gpu_wheels.sh "$carried" "$python"
"$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site" "$carried"/*.whl
export PYTHONPATH=$tree:$tree/kernels:$work/site

step "native library for sm_90"
if ! nvcc --version 2>/dev/null | grep -q 'release 13\.0'; then
  "$python" -m pip install -q --no-deps --target "$work/toolkit" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
    nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96
  export CUDA_HOME=$work/toolkit/nvidia/cu13
fi
(cd "$tree" && POINTALIGN_BUILD=cuda TORCH_CUDA_ARCH_LIST=9.0 "$python" setup.py -q build_ext --inplace)
cp "$tree/kernels/pointalign_kernels/_native.abi3.so" "$carried/"
"$python" -c 'from pointalign_kernels import point_ops; assert "cuda" in point_ops.NATIVE_DEVICES, point_ops._load_error'

step "Triton's cache for sm_90"
rm -rf "$TRITON_CACHE_DIR"
(cd "$tree" && "$python" benchmarks/warm_triton.py)
tar -C "$TRITON_CACHE_DIR" -czf "$carried/triton.tgz" .

step "every stage of the suite"
failed=0
(cd "$tree" && "$python" benchmarks/gpu_suite.py --rehearse --output "$work/results" --archive "$work/results.tgz") ||
  failed=1

step "tests that need no GPU"
"$python" - pyproject.toml <<'PYTHON' >"$work/requirements.txt"
import sys
import tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print("\n".join([*project["dependencies"], *project["optional-dependencies"]["dev"], *project["optional-dependencies"]["eval"]]))
PYTHON
"$python" -m pip install -q -c constraints-gpu.txt -r "$work/requirements.txt"
# Triton 3.6 cannot interpret loops whose bounds are known only at run time under numpy >= 2.4.
(cd "$tree" && "$python" -m pytest tests -q -n 2 --dist loadfile -p no:cacheprovider \
  --ignore tests/test_alignment_interpreted.py --ignore tests/test_liger_interpreted.py \
  --ignore tests/test_fused_training.py) || failed=1

step "what travels"
du -ch --apparent-size "$carried"/* | sed 's/^/    /'
mib=$(($(du -sb "$carried" | cut -f1) / 1048576 + $(git ls-files -z | xargs -0 ls -ld 2>/dev/null | awk '{n += $5} END {print int(n / 1048576)}') + 1))
echo "    with the tracked files about $mib MiB of at most $largest_mib"
[ "$mib" -le "$largest_mib" ] || failed=1
step "$([ $failed = 0 ] && echo passed || echo FAILED)"
exit $failed
