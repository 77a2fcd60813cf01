"""Steps around the first import of another package, so that `import pointalign` itself imports no heavy package."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace


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


def register_models() -> None:
    """Tell transformers' Auto classes about the models: importing `pointalign.models` does."""
    import_module("pointalign.models")


@contextmanager
def register_after_transformers() -> Iterator[None]:
    # Not around a module inside transformers: `pointalign.models` imports others, of which one may be half imported.
    yield
    try:
        register_models()
    except ImportError as error:  # `import transformers` itself must not fail for it
        warnings.warn(f"transformers' Auto classes do not know pointalign's models: {error}", stacklevel=2)


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Give bitsandbytes a stand-in for Hugging Face's `kernels`, with which it takes the kernel that it ships.

    On a CPU with AVX512-BF16 `bitsandbytes.backends.cpu.ops` fetches a kernel from a hub at import, and no option
    prevents it. In a checkout its `import kernels` finds the folder of that name and bitsandbytes prints a warning.
    """
    missing = object()
    before = sys.modules.get("kernels", missing)
    kernel = SimpleNamespace(gemm_4bit_forward=None)  # None: bitsandbytes computes with its compiled library
    sys.modules["kernels"] = SimpleNamespace(get_kernel=lambda *_args, **_kwargs: kernel)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


def install() -> None:
    """Register the models now if transformers is imported already, else when it is; once per process."""
    if not any(isinstance(finder, ImportSteps) for finder in sys.meta_path):
        steps = {"transformers": register_after_transformers, "bitsandbytes.backends.cpu.ops": without_hub_kernels}
        sys.meta_path.insert(0, ImportSteps(steps))
    if "transformers" in sys.modules:
        register_models()
