"""Optional native build, switched by POINTALIGN_BUILD=auto|none|cpu|cuda. Metadata lives in pyproject.toml.

`auto` builds what the machine can and never fails an installation; `cpu` and `cuda` build or fail with the reason.
TORCH_CUDA_ARCH_LIST ("9.0", "8.6;8.9") narrows the GPUs that a CUDA build serves.
The library uses torch's stable ABI and no Python symbol: one file serves every torch from 2.11 and every Python.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

BUILDS = ("auto", "none", "cpu", "cuda")
SOURCES = ["csrc/schema.cpp", "csrc/bindings_cpu.cpp", "csrc/point_ops_cpu.cpp"]
CUDA_SOURCES = ["csrc/bindings_cuda.cpp"]
CUDA_KERNELS = "csrc/point_ops_cuda.cu"
HEADERS = ["csrc/bindings.h", "csrc/point_ops_cpu.h", "csrc/point_ops_cpu.inl", "csrc/point_ops_cuda.h"]
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
STABLE_ABI = "0x020b000000000000"  # torch 2.11


def find_nvcc() -> str:
    """The path of nvcc, or an empty string."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    in_home = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    return in_home or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def missing_for(build: str) -> str | None:
    """Why this machine cannot build the `cpu` or `cuda` library, or None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in the build environment (use --no-build-isolation)"
    if build == "cuda":
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if not find_nvcc():
            return "nvcc is neither on PATH nor under CUDA_HOME"
    return None


def extension(build: str, optional: bool) -> Extension:
    import torch

    package = Path(torch.__path__[0])
    cuda = build == "cuda"
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", STABLE_ABI)]
    if cuda:
        macros.append(("USE_CUDA", None))
    return Extension(
        "pointalign_kernels._native",
        SOURCES + CUDA_SOURCES * cuda,
        depends=HEADERS + [CUDA_KERNELS] * cuda,
        include_dirs=[str(package / "include")],
        library_dirs=[str(package / "lib")],
        libraries=["torch_cpu", "torch_cuda"] if cuda else ["torch_cpu"],
        define_macros=macros,
        # No contraction: a fused multiply-add would round differently from the reference and from the GPU.
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"],
        language="c++",
        py_limited_api=True,
        optional=optional,
    )


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if CUDA_SOURCES[0] in ext.sources:
            ext.extra_objects = [self.compile_kernels()]
            ext.extra_link_args = self.cuda_runtime()
        super().build_extension(ext)

    def compile_kernels(self) -> str:
        nvcc = find_nvcc()
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        asked = (
            os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(".", "").replace("+PTX", "").replace(";", " ").split()
        )
        architectures = [number for number in asked or CUDA_ARCHITECTURES if f"compute_{number}" in known]
        if not architectures:
            raise CompileError(f"nvcc knows none of the architectures {asked or CUDA_ARCHITECTURES}, only {known}")
        target = Path(self.build_temp, CUDA_KERNELS).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c", CUDA_KERNELS]
        command += ["-o", str(target)]
        for number in architectures:
            command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        command += ["-gencode", f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
        print(" ".join(command))
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"nvcc failed on {CUDA_KERNELS}: {error}") from error
        return str(target)

    @staticmethod
    def cuda_runtime() -> list[str]:
        # The static runtime shares torch's context and asks nothing of the machine that installs the wheel.
        listing = subprocess.run([find_nvcc(), "--dryrun", CUDA_KERNELS], capture_output=True, text=True).stderr
        folders = [word.strip('"')[2:] for word in listing.split() if word.strip('"').startswith("-L")]
        for folder in folders:
            if (library := Path(folder, "libcudart_static.a")).exists():
                return [str(library), "-ldl", "-lrt", "-lpthread"]
        raise CompileError(f"libcudart_static.a is in none of nvcc's library folders {folders}")


def extensions(build: str) -> list[Extension]:
    if build == "none":
        return []
    if build in ("cpu", "cuda"):
        if (reason := missing_for(build)) is not None:
            raise SystemExit(f"POINTALIGN_BUILD={build}: {reason}")
        return [extension(build, optional=False)]
    for candidate in ("cuda", "cpu"):
        if (reason := missing_for(candidate)) is None:
            return [extension(candidate, optional=True)]
    print(f"pointalign: point ops stay plain Python, which is slow: {reason}")
    return []


build = os.environ.get("POINTALIGN_BUILD", "auto")
if build not in BUILDS:
    raise SystemExit(f"POINTALIGN_BUILD={build!r}: expected one of {', '.join(BUILDS)}")
modules = extensions(build)
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
