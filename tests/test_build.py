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
    compiler = tmp_path / "compiler"  # `make test-long` compiles with optimisation, which takes longer
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    run_setup(sdist, "cpu", "-q", "bdist_wheel", "--dist-dir", str(tmp_path), CC=str(compiler), CXX=str(compiler))
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


@pytest.fixture
def isolated(tmp_path):
    """Runs a program as pip's build environment would: of the installed packages, only setuptools can be imported."""
    packages = Path(setuptools.__file__).parents[1]
    site = tmp_path / "build_environment"
    site.mkdir()
    for path in [packages / "setuptools", packages / "_distutils_hack", *packages.glob("setuptools-*.dist-info")]:
        (site / path.name).symlink_to(path)
    isolate = f"import sys; sys.path = [{str(site)!r}, 'csrc', *(p for p in sys.path if 'packages' not in p)];"

    def run(program, folder, build="auto"):
        environment = os.environ | {"POINTALIGN_BUILD": build}
        command = [sys.executable, "-c", isolate + program]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


NO_TORCH = "import sysconfig; sysconfig.get_path = lambda name: 'nowhere';"
HOOKS = ("get_requires_for_build_wheel", "get_requires_for_build_editable")
REQUIRES = f"import build_backend as b; found = {', '.join(f'b.{hook}()' for hook in HOOKS)}; print('\\n', *found)"


def build_program(folder):
    """A program that runs setup.py and writes below `folder`."""
    arguments = ["setup.py", "build_ext", "--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    return f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path('setup.py')"


@pytest.mark.skipif(
    "POINTALIGN_LONG_TESTS" not in os.environ, reason="compiles for half a minute: run it by `make test-long`"
)
@needs_compiler
def test_an_isolated_build_uses_the_torch_beside_pip(isolated, sdist, tmp_path):
    assert isolated("import torch", sdist).returncode != 0
    assert isolated(REQUIRES, sdist).stdout.endswith("\n [] []\n")
    result = isolated(build_program(tmp_path), sdist)
    assert result.returncode == 0, result.stderr[-3000:]
    (library,) = (tmp_path / "lib").rglob("*.so")
    program = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.pointalign_kernels.knn)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_isolated_build_without_any_torch_asks_for_one(isolated, sdist):
    """The range of the requirement is that of the package."""
    torch_range = next(line for line in (ROOT / "pyproject.toml").read_text().split('"') if line.startswith("torch>="))
    assert isolated(NO_TORCH + REQUIRES, sdist).stdout.endswith(f"\n ['{torch_range}'] ['{torch_range}']\n")
    assert isolated(NO_TORCH + REQUIRES, sdist, build="none").stdout.endswith("\n [] []\n")


@pytest.mark.parametrize(("build", "code"), [("auto", 0), ("cpu", 1), ("none", 0)])
def test_no_torch_at_all(isolated, sdist, tmp_path, build, code):
    result = isolated(NO_TORCH + build_program(tmp_path), sdist, build)
    assert result.returncode == code, result.stderr
    said = [line for line in result.stderr.splitlines() if "no torch>=2.11,<2.14 was found to build against" in line]
    assert len(said) == (build != "none"), result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_torch_older_than_the_stable_abi_is_not_built_against(isolated, sdist, tmp_path):
    package = tmp_path / "torch"
    (package / "include/torch/csrc/stable").mkdir(parents=True)
    (package / "version.py").write_text("__version__, cuda = '2.9.1+cu130', '13.0'\n")
    old = f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r};"
    assert "torch>=2.11" in isolated(old + REQUIRES, sdist).stdout
    (package / "version.py").write_text("__version__, cuda = '2.11.0+cu130', '13.0'\n")
    assert isolated(old + REQUIRES, sdist).stdout.endswith("\n [] []\n")


@pytest.mark.parametrize(("build", "succeeds"), [("auto", True), ("cpu", False)])
def test_a_broken_compiler(sdist, tmp_path, build, succeeds):
    broken = {"CC": "false", "CXX": "false"}
    folders = ("--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    result = run_setup(sdist, build, "build_ext", *folders, check=False, **broken)
    assert (result.returncode == 0) == succeeds, result.stderr[-3000:]
    assert "_native" in result.stdout + result.stderr  # names the extension that failed
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture(params=["compiling", "listing"])
def broken_nvcc(request, tmp_path):
    """Environment with a torch that says it was built with CUDA, and an nvcc that fails."""
    package = tmp_path / "site/torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"__version__, cuda = {torch.__version__!r}, '13.0'\n")
    for name in ("include", "lib"):
        (package / name).symlink_to(Path(torch.__file__).parent / name)
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    listed = "[ $1 = --list-gpu-arch ] && echo compute_90 && exit 0\n" if request.param == "compiling" else ""
    nvcc.write_text(f"#!/bin/sh\n{listed}echo 'nvcc fatal: broken' >&2; exit 2\n")
    nvcc.chmod(0o755)
    return {"PYTHONPATH": str(package.parent), "CUDA_HOME": str(nvcc.parents[1])}


def test_auto_falls_back_from_cuda_to_the_cpu(sdist, tmp_path, broken_nvcc):
    """The compiler is a stand-in that writes empty files: what counts is which builds are tried."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n')
    compiler.chmod(0o755)
    folders = ("--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    result = run_setup(sdist, "auto", "build_ext", *folders, CC=str(compiler), CXX=str(compiler), **broken_nvcc)
    assert "the cuda build of pointalign_kernels._native failed" in result.stderr
    assert "building for cpu only" in result.stderr
    assert [library.name for library in (tmp_path / "lib").rglob("*.so")] == ["_native.abi3.so"]


def test_auto_falls_back_from_both_to_plain_python(sdist, tmp_path, broken_nvcc):
    folders = ("--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    result = run_setup(sdist, "auto", "build_ext", *folders, CC="false", CXX="false", **broken_nvcc)
    said = [line for line in result.stderr.splitlines() if line.startswith("pointalign: ")]
    assert len(said) == 2, result.stderr
    assert "building for cpu only" in said[0]
    assert "installing without the native library, point ops run as plain PyTorch" in said[1]
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_an_explicit_cuda_build_never_falls_back(sdist, tmp_path, broken_nvcc):
    folders = ("--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    result = run_setup(sdist, "cuda", "build_ext", *folders, check=False, **broken_nvcc)
    assert result.returncode != 0
    assert not list((tmp_path / "lib").rglob("*.so"))


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
@pytest.mark.skipif("POINTALIGN_LONG_TESTS" not in os.environ, reason="takes minutes: run it by `make test-long`")
def test_the_cuda_build_registers_its_kernels(sdist, tmp_path):
    """Without a CUDA torch: a copy of its version file says CUDA, a stub holds the only symbol of libtorch_cuda."""
    stub = tmp_path / "libtorch_cuda.so"
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }'
    subprocess.run(["g++", "-shared", "-fPIC", "-xc++", "-", "-o", str(stub)], input=source, text=True, check=True)
    program = (
        "import sys, runpy; sys.path.insert(0, 'csrc'); import build_backend as b;"
        "real = b.find_torch(); b.find_torch = lambda: real._replace(cuda='13.0');"
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
