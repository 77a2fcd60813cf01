"""The ModelNet40 test file as PointLLM distributes it, read without running what a pickle may hold."""

import pickle
from pathlib import Path

import numpy as np

CLASSES = (
    "airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain desk door dresser flower_pot "
    "glass_box guitar keyboard lamp laptop mantel monitor night_stand person piano plant radio range_hood sink sofa "
    "stairs stool table tent toilet tv_stand vase wardrobe xbox"
).split()
CLASSES = tuple(name.replace("_", " ") for name in CLASSES)
_ALLOWED = {
    (module, name)
    for module in (
        "numpy",
        "numpy.core.multiarray",
        "numpy._core.multiarray",
        "numpy.core.numeric",
        "numpy._core.numeric",
    )
    for name in ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
} | {("_codecs", "encode")}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"expected lists and arrays only, the file asks for {module}.{name}")
        return super().find_class(module, name)


def read_modelnet(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """Clouds `[N, 6]` (xyz, black) and class indices of a `.dat` file; normals are dropped.

    Raises:
        ValueError: not that format, or a label outside of 0..39.
    """
    with Path(path).open("rb") as file:
        try:
            clouds, labels = _ArraysOnly(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a pickle of (clouds, labels) as PointLLM distributes it: {error}"
            ) from error
    if len(clouds) != len(labels):
        raise ValueError(f"{path}: {len(clouds)} clouds but {len(labels)} labels")
    indices = [int(np.asarray(label).item()) for label in labels]
    if any(not 0 <= index < len(CLASSES) for index in indices):
        raise ValueError(f"{path}: a class index lies outside of 0..{len(CLASSES) - 1}")
    black = [np.concatenate([np.asarray(c)[:, :3], np.zeros((len(c), 3))], axis=1).astype(np.float32) for c in clouds]
    return black, indices
