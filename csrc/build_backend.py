"""Build backend: setuptools', which builds against the torch that the package will run with.

pip builds in an environment of its own that holds only what a backend asks for. The native library needs torch's
headers and libraries, not a running torch, so the torch already installed beside pip serves; only where there is none
(or none in range) the backend asks for another, the same release that pip then installs as a dependency.
"""

import importlib.util
import os
import runpy
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks of the backend)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

TORCH = "torch>=2.11,<2.14"  # the range of pyproject.toml
OLDEST = (2, 11)  # the first torch whose stable ABI the sources use


class Torch(NamedTuple):
    """An installed torch, read from its files without importing it."""

    folder: Path
    version: str
    cuda: str | None  # version of the CUDA that it was built with


def find_torch() -> Torch | None:
    """The torch to build against: of the build environment, else of the environment that pip installs into."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    for folder in folders:
        if (folder / "version.py").exists() and (folder / "include/torch/csrc/stable").is_dir():
            content = runpy.run_path(str(folder / "version.py"))
            if tuple(map(int, content["__version__"].split(".")[:2])) >= OLDEST:
                return Torch(folder, content["__version__"], content["cuda"])
    return None


def _torch_requirement() -> list[str]:
    wanted = os.environ.get("POINTALIGN_BUILD", "auto") != "none"
    return [TORCH] if wanted and find_torch() is None else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
