"""PointAlign: feature-level alignment for 3D vision-language models.

The public names are imported at first use, so `import pointalign` imports neither torch nor transformers. Once both
`pointalign` and `transformers` are imported, in either order, transformers' Auto classes know the models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pointalign import import_steps

if TYPE_CHECKING:
    from pointalign.alignment import Alignment, AlignmentConfig, AlignmentProjector, LayerTap
    from pointalign.build import load
    from pointalign.data.point_cloud import PointCloudError, load_point_cloud
    from pointalign.models import (
        PointAlignConfig,
        PointAlignFeatureExtractor,
        PointAlignForConditionalGeneration,
        PointAlignModel,
        PointAlignProcessor,
    )

    __version__: str

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "AlignmentProjector",
    "LayerTap",
    "PointAlignConfig",
    "PointAlignFeatureExtractor",
    "PointAlignForConditionalGeneration",
    "PointAlignModel",
    "PointAlignProcessor",
    "PointCloudError",
    "__version__",
    "load",
    "load_point_cloud",
]

_MODULES = {
    "pointalign.alignment": ("Alignment", "AlignmentConfig", "AlignmentProjector", "LayerTap"),
    "pointalign.build": ("load",),
    "pointalign.data.point_cloud": ("PointCloudError", "load_point_cloud"),
    "pointalign.models": (
        "PointAlignConfig",
        "PointAlignFeatureExtractor",
        "PointAlignForConditionalGeneration",
        "PointAlignModel",
        "PointAlignProcessor",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
    elif name in _MODULE_OF:
        globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pointalign")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


import_steps.install()
