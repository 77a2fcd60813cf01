"""Optional native build, switched by POINTALIGN_BUILD=auto|none|cpu|cuda. Metadata lives in pyproject.toml.

`auto` tries CUDA, then the CPU, then installs without the library, and never fails an installation; `cpu` and `cuda`
build or fail with the reason. TORCH_CUDA_ARCH_LIST ("9.0", "8.6;8.9") narrows the GPUs that a CUDA build serves.
The library uses torch's stable ABI and no Python symbol: one file serves every torch from 2.11 and every Python.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_backend import TORCH, Torch, find_torch

BUILDS = ("auto", "none", "cpu", "cuda")
SOURCES = ["csrc/schema.cpp", "csrc/bindings_cpu.cpp", "csrc/point_ops_cpu.cpp"]
CUDA_SOURCES = ["csrc/bindings_cuda.cpp"]
CUDA_KERNELS = "csrc/point_ops_cuda.cu"
HEADERS = ["csrc/bindings.h", "csrc/point_ops_cpu.h", "csrc/point_ops_cpu.inl", "csrc/point_ops_cuda.h"]
CUDA_HEADERS = ["csrc/point_ops_cuda.cuh", "csrc/point_ops_buckets.cuh", "csrc/sorted_clouds.cuh"]
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
STABLE_ABI = "0x020b000000000000"  # torch 2.11
PURE_PYTHON = "installing without the native library, point ops run as plain PyTorch, which is slow"
# How a build fails: the compiler's errors, a tool that is missing or broken.
BUILD_ERRORS = (BaseError, CCompilerError, OSError, subprocess.CalledProcessError)


def find_nvcc(torch: Torch) -> str:
    """The path of nvcc, or an empty string: CUDA_HOME, PATH, /usr/local/cuda, then the wheels beside torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [str(Path(home, "bin"))] if home else []
    folders += [None, "/usr/local/cuda/bin"]
    folders += [str(folder) for folder in sorted(torch.folder.parent.glob("nvidia/cu*/bin"))]
    return next((path for folder in folders if (path := shutil.which("nvcc", path=folder))), "")


def missing_for(build: str, torch: Torch | None) -> str | None:
    """Why this machine cannot build the `cpu` or `cuda` library, or None where it can."""
    if torch is None:
        return f"no {TORCH} was found to build against; install it first and repeat"
    if build == "cuda" and torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    if build == "cuda" and not find_nvcc(torch):
        return "nvcc is neither on PATH nor under CUDA_HOME"
    return None


def candidates(build: str, torch: Torch | None) -> list[str]:
    """The builds to try in turn; SystemExit where an explicit request cannot be met."""
    if build == "none":
        return []
    if build in ("cpu", "cuda"):
        if (reason := missing_for(build, torch)) is not None:
            raise SystemExit(f"POINTALIGN_BUILD={build}: {reason}")
        return [build]
    possible = [name for name in ("cuda", "cpu") if missing_for(name, torch) is None]
    if not possible:
        say(f"{PURE_PYTHON}: {missing_for('cpu', torch)}")
    return possible


def say(text: str) -> None:
    print(f"pointalign: {text}", file=sys.stderr, flush=True)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        """The first of BUILDS_TO_TRY that compiles and links; an optional extension may end up unbuilt."""
        self.force = True  # an older library here may have been built for other devices
        for number, build in enumerate(BUILDS_TO_TRY):
            self.configure(ext, build)
            try:
                if build == "cuda":
                    ext.extra_objects = [self.compile_kernels()]
                    ext.extra_link_args = self.cuda_runtime()
                super().build_extension(ext)
                return
            except BUILD_ERRORS as error:
                if not ext.optional:
                    raise
                following = [f"building for {name} only" for name in BUILDS_TO_TRY[number + 1 :]]
                say(f"the {build} build of {ext.name} failed ({error}); {(following or [PURE_PYTHON])[0]}")

    @staticmethod
    def configure(ext: Extension, build: str) -> None:
        assert TORCH_HERE is not None
        cuda = build == "cuda"
        ext.sources = SOURCES + CUDA_SOURCES * cuda
        ext.depends = HEADERS + [CUDA_KERNELS, *CUDA_HEADERS] * cuda
        ext.include_dirs = [str(TORCH_HERE.folder / "include")]
        ext.library_dirs = [str(TORCH_HERE.folder / "lib")]
        ext.libraries = ["torch_cpu", "torch_cuda"] if cuda else ["torch_cpu"]
        ext.define_macros = [("TORCH_TARGET_VERSION", STABLE_ABI)]
        if cuda:
            ext.define_macros.append(("USE_CUDA", None))
        ext.extra_objects, ext.extra_link_args = [], []

    def compile_kernels(self) -> str:
        assert TORCH_HERE is not None
        nvcc = find_nvcc(TORCH_HERE)
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
        subprocess.run(command, check=True)
        return str(target)

    @staticmethod
    def cuda_runtime() -> list[str]:
        # The static runtime shares torch's context and asks nothing of the machine that installs the wheel.
        assert TORCH_HERE is not None
        nvcc = find_nvcc(TORCH_HERE)
        listing = subprocess.run([nvcc, "--dryrun", CUDA_KERNELS], capture_output=True, text=True).stderr
        folders = [Path(word.strip('"')[2:]) for word in listing.split() if word.strip('"').startswith("-L")]
        folders.append(Path(nvcc).resolve().parents[1] / "lib")  # NVIDIA's wheels name lib64 and have lib
        for folder in folders:
            if (library := folder / "libcudart_static.a").exists():
                return [str(library), "-ldl", "-lrt", "-lpthread"]
        raise CompileError(f"libcudart_static.a is in none of nvcc's library folders {folders}")


requested = os.environ.get("POINTALIGN_BUILD", "auto")
if requested not in BUILDS:
    raise SystemExit(f"POINTALIGN_BUILD={requested!r}: expected one of {', '.join(BUILDS)}")
# Asked for metadata alone, before pip has fetched what the build requires: nothing is built, so nothing is missing.
only_metadata = bool({"egg_info", "dist_info"} & set(sys.argv))
TORCH_HERE = None if only_metadata or requested == "none" else find_torch()
BUILDS_TO_TRY = [] if only_metadata else candidates(requested, TORCH_HERE)
native = Extension(
    "pointalign_kernels._native",
    SOURCES,
    # No contraction: a fused multiply-add would round differently from the reference and from the GPU.
    extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"],
    language="c++",
    py_limited_api=True,
    optional=requested == "auto",
)
setup(
    ext_modules=[native] if BUILDS_TO_TRY else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if BUILDS_TO_TRY else {},
)
