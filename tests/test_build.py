"""The optional native build: what POINTALIGN_BUILD promises, the sdist, and a wheel made from it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def find_nvcc():
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution: what pip would build from."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__", "results", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    run_setup(source, "none", "-q", "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def run_setup(folder, build, *arguments, check=True, **environment):
    result = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env=os.environ | {"POINTALIGN_BUILD": build} | environment,
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def test_the_sdist_holds_every_native_source(sdist):
    wanted = {path.name for path in (ROOT / "csrc").iterdir() if path.is_file()}
    assert {path.name for path in (sdist / "csrc").iterdir()} == wanted
    assert "point_ops_cuda.cu" in wanted


@needs_compiler
def test_a_wheel_from_the_sdist_works_elsewhere(sdist, tmp_path):
    run_setup(sdist, "cpu", "-q", "bdist_wheel", "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-cp310-abi3-\w+\.whl$", wheel.name), wheel.name  # one file for every Python
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        files.extractall(tmp_path / "site")
    assert [name for name in names if name.endswith(".so")] == ["pointalign_kernels/_native.abi3.so"]
    program = (
        "import torch, pointalign_kernels as p; print(p.__file__);"
        "print(p.farthest_point_sample(torch.eye(3)[None], 3, impl='native').tolist())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(tmp_path / "site/pointalign_kernels/__init__.py"), "[[0, 1, 2]]"]


def test_none_gives_a_pure_wheel(sdist, tmp_path):
    run_setup(sdist, "none", "-q", "bdist_wheel", "--bdist-dir", str(tmp_path / "b"), "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_auto_without_torch_says_so_and_succeeds(sdist, tmp_path):
    """An isolated build sees setuptools only."""
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(setuptools.__file__).parent.with_name(name))
    command = [sys.executable, "-S", "setup.py", "build_ext", "--inplace"]
    for build, code in (("auto", 0), ("cpu", 1)):
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "POINTALIGN_BUILD": build}
        result = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert "torch is not installed in the build environment" in result.stdout + result.stderr
    assert not list(sdist.glob("kernels/pointalign_kernels/*.so"))


@pytest.mark.parametrize(("build", "succeeds"), [("auto", True), ("cpu", False)])
def test_a_broken_compiler(sdist, tmp_path, build, succeeds):
    broken = {"CC": "false", "CXX": "false"}
    folders = ("--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    result = run_setup(sdist, build, "build_ext", *folders, check=False, **broken)
    assert (result.returncode == 0) == succeeds, result.stderr[-3000:]
    assert "_native" in result.stdout + result.stderr  # names the extension that failed
    assert not list(tmp_path.rglob("*.so"))


def test_wrong_requests_fail_with_the_reason(sdist):
    result = run_setup(sdist, "gpu", "--name", check=False)
    assert result.returncode != 0
    assert "POINTALIGN_BUILD='gpu': expected one of auto, none, cpu, cuda" in result.stderr
    if torch.version.cuda is None:
        result = run_setup(sdist, "cuda", "--name", check=False)
        assert result.returncode != 0
        assert "is built without CUDA" in result.stderr


@needs_compiler
@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
def test_the_cuda_build_registers_its_kernels(sdist, tmp_path):
    """Without a CUDA torch: setup.py believes in one, and a stub stands for the only symbol of libtorch_cuda."""
    stub = tmp_path / "libtorch_cuda.so"
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }'
    subprocess.run(["g++", "-shared", "-fPIC", "-xc++", "-", "-o", str(stub)], input=source, text=True, check=True)
    program = (
        "import sys, runpy, torch; torch.version.cuda = '13.0';"
        f"sys.argv = ['setup.py', 'build_ext', '--build-temp', {str(tmp_path / 'temp')!r},"
        f" '--build-lib', {str(tmp_path)!r}]; runpy.run_path('setup.py')"
    )
    environment = os.environ | {
        "POINTALIGN_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "LIBRARY_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path),
    }
    run = {"env": environment, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", program], cwd=sdist, **run)
    assert result.returncode == 0, result.stderr[-3000:]
    program = (
        f"import torch; torch.ops.load_library({str(tmp_path / 'pointalign_kernels/_native.abi3.so')!r});"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print([has('pointalign_kernels::' + name, key) for key in ('CPU', 'CUDA')"
        " for name in ('farthest_point_sample', 'knn', 'group_points')])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, **run)
    assert result.stdout == "[True, True, True, True, True, True]\n", result.stderr
