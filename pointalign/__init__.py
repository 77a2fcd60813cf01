"""PointAlign: feature-level alignment for 3D vision-language models.

The public names are imported at first use, so `import pointalign` imports neither torch nor transformers. Once both
`pointalign` and `transformers` are imported, in either order, transformers' Auto classes know the models.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointalign.alignment import Alignment, AlignmentConfig, AlignmentProjector, LayerTap
    from pointalign.attachment import attach
    from pointalign.build import load
    from pointalign.data.point_cloud import PointCloudError, load_point_cloud
    from pointalign.models import (
        PointAlignConfig,
        PointAlignFeatureExtractor,
        PointAlignForConditionalGeneration,
        PointAlignModel,
        PointAlignProcessor,
    )  # fmt: skip

    __version__: str

__all__ = [
    "Alignment", "AlignmentConfig", "AlignmentProjector", "LayerTap", "PointAlignConfig", "PointAlignFeatureExtractor",
    "PointAlignForConditionalGeneration", "PointAlignModel", "PointAlignProcessor", "PointCloudError", "__version__",
    "attach", "load", "load_point_cloud",
]  # fmt: skip

# -- public names ------------------------------------------------------------------------------------------------------

_MODULE_OF = {
    **dict.fromkeys(__all__, "pointalign.models"),
    **dict.fromkeys(("Alignment", "AlignmentConfig", "AlignmentProjector", "LayerTap"), "pointalign.alignment"),
    **dict.fromkeys(("PointCloudError", "load_point_cloud"), "pointalign.data.point_cloud"),
    "attach": "pointalign.attachment",
    "load": "pointalign.build",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _version() if name == "__version__" else getattr(import_module(_MODULE_OF[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pointalign")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


# -- steps around the first import of another package ------------------------------------------------------------------


class ImportSteps:
    """A finder for `sys.meta_path` that lets the other finders find a module and runs a step around its execution.

    Args:
        steps: module name -> context manager that is entered before the module's code runs and left after it.
    """

    def __init__(self, steps: dict[str, Callable[[], AbstractContextManager[None]]]):
        self.steps = steps

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.steps:
            return None
        finders = [getattr(finder, "find_spec", None) for finder in sys.meta_path if finder is not self]
        specs = (find(name, path, target) for find in finders if find is not None)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute, step = spec.loader.exec_module, self.steps[name]

            def exec_module(module: ModuleType) -> None:
                with step():
                    execute(module)

            spec.loader.exec_module = exec_module  # a loader belongs to this spec alone
        return spec


@contextmanager
def _register_after_transformers() -> Iterator[None]:
    """Tell transformers' Auto classes about the models: importing `pointalign.models` does.

    Not around a module inside transformers: `pointalign.models` imports others, of which one may be half imported.
    """
    yield
    try:
        import_module("pointalign.models")
    except ImportError as error:  # `import transformers` itself must not fail for it
        warnings.warn(f"transformers' Auto classes do not know pointalign's models: {error}", stacklevel=2)


@contextmanager
def _without_kernels_folder() -> Iterator[None]:
    """Say that there is no package `kernels` where that name is a folder without one, as in a checkout.

    transformers looks for its version, which the folder does not have, and then in the file lists of all packages that
    are installed: a second or more.
    """
    spec = None if "kernels" in sys.modules else find_spec("kernels")
    if spec is None or spec.origin is not None:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]  # what the import system takes for absent
    try:
        yield
    finally:
        del sys.modules["kernels"]


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Give bitsandbytes a stand-in for Hugging Face's `kernels`, with which it takes the kernel that it ships.

    On a CPU with AVX512-BF16 `bitsandbytes.backends.cpu.ops` fetches a kernel from a hub at import, and no option
    prevents it. In a checkout its `import kernels` finds the folder of that name and bitsandbytes prints a warning.
    """
    before = {name: sys.modules[name] for name in sys.modules.keys() & {"kernels"}}
    kernel = SimpleNamespace(gemm_4bit_forward=None)  # None: bitsandbytes computes with its compiled library
    sys.modules["kernels"] = SimpleNamespace(get_kernel=lambda *_args, **_kwargs: kernel)  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)


if not any(type(finder).__name__ == "ImportSteps" for finder in sys.meta_path):  # once, also if this file is reloaded
    _steps = {
        "transformers": _register_after_transformers,
        "transformers.integrations.hub_kernels": _without_kernels_folder,
        "bitsandbytes.backends.cpu.ops": _without_hub_kernels,
    }
    sys.meta_path.insert(0, ImportSteps(_steps))
if "transformers" in sys.modules:
    import_module("pointalign.models")
