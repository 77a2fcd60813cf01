"""The native sources without Python: sanitizers, the CUDA kernels on an emulator, registers and spills by nvcc."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
long = pytest.mark.skipif("POINTALIGN_LONG_TESTS" not in os.environ, reason="more cards: run it by `make test-long`")
needs_x86 = pytest.mark.skipif("x86_64" not in sysconfig.get_platform(), reason="the CUDA emulator is x86-64 only")


@needs_compiler
@needs_x86
def test_sanitized_checker(tmp_path):
    """Every CPU variant and the emulated CUDA kernels equal brute force, with no bad access or undefined behaviour.

    POINTALIGN_FUZZ_CASES=5000 POINTALIGN_FUZZ_SEED=7 pytest tests/test_native.py -k checker   # a longer search
    """
    program = tmp_path / "check"
    flags = ["-std=c++20", "-g1", "-ffp-contract=off", "-w", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all"]
    # The CPU ops are three times their file, which takes longer to optimise than to run; the emulator is the slow part.
    sources = {"csrc/point_ops_cpu.cpp": "-O0", "tests/native/check_point_ops.cpp": "-O1"}
    objects = []
    for source, level in sources.items():
        objects.append(str(tmp_path / f"{Path(source).stem}.o"))
        subprocess.run([COMPILER, *flags, level, "-c", str(ROOT / source), "-o", objects[-1]], check=True)
    subprocess.run([COMPILER, *flags, *objects, "-o", str(program)], check=True)
    arguments = [os.environ.get("POINTALIGN_FUZZ_CASES", "12"), os.environ.get("POINTALIGN_FUZZ_SEED", "1")]
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == f"{arguments[0]} cases\n"


# Registers above which fewer threads fit than the launch bounds promise; a spill anywhere fails.
REGISTER_BUDGETS = {"sample_in_registersILi256ELi32E": 232, "sample_in_registers": 128, "sample_in_workspace": 64}
REGISTER_BUDGETS |= {"sample_in_buckets": 128, "sort_points": 64, "search_buckets": 64, "search": 128}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", [80, 90, 120, *(pytest.param(number, marks=long) for number in (86, 89, 100))])
def test_registers_and_spills(architecture, tmp_path):
    command = [NVCC, "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    command += ["-o", str(tmp_path / "kernels.cubin"), str(ROOT / "csrc/point_ops_cuda.cu")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    # Sampling: 5 sizes in registers, 1 in the workspace, 2 over buckets; sorting; kNN and 3 group dtypes, twice.
    assert len(entries) == 17, report
    for name, *numbers in entries:
        stack, stores, loads, registers = map(int, numbers)
        budget = next(budget for part, budget in REGISTER_BUDGETS.items() if part in name)
        assert stack == stores == loads == 0, f"{name} spills"
        assert registers <= budget, f"{name}: {registers} registers, budget {budget}"
