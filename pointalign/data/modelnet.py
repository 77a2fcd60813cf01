"""ModelNet40 as PointBERT and PointLLM store it: `modelnet40_test_8192pts_fps.dat`, a pickle of clouds and labels.

The pickle is not trusted: it can build lists, numbers and the inert stand-ins below only. The arrays are built from
those, after their sizes are checked.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.data.point_cloud import PointCloudError

CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower pot", "glass box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night stand", "person", "piano", "plant", "radio", "range hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv stand", "vase", "wardrobe", "xbox",
)  # fmt: skip
_TYPES = {"f4", "f8", "i4", "i8", "u1"}


class _Type:
    """Stands for numpy.dtype."""

    def __init__(self, name: str = "", *_: Any):
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if self.name not in _TYPES:
            raise PointCloudError(f"expected arrays of numbers ({', '.join(sorted(_TYPES))}), got {self.name!r:.50}")
        return np.dtype(("<" if self.order == "|" else self.order) + self.name)


class _Array:
    """Stands for numpy.ndarray, however the pickle builds it."""

    def __init__(self, *state: Any):
        self.state = state

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        match self.state:
            case (int(), tuple(shape), _Type() as kind, bool() | int() as fortran, bytes() as data):  # __setstate__
                order = "F" if fortran else "C"
            case (bytes() | bytearray() as data, _Type() as kind, tuple(shape), ("C" | "F") as order):  # protocol 5
                pass
            case (_Type() as kind, bytes() as data):  # a numpy scalar
                shape, order = (), "C"
            case _:
                raise PointCloudError("an array of the pickle is not stored as numpy stores them")
        dtype = kind.numpy()
        if not all(isinstance(n, int) and n >= 0 for n in shape) or int(np.prod(shape)) * dtype.itemsize != len(data):
            raise PointCloudError(f"an array of the pickle promises the shape {shape}, its data are {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package = module.replace("numpy._core", "numpy.core")
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy.core.multiarray", "scalar"): _Array,
            ("numpy.core.numeric", "_frombuffer"): _Array,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Type,
        }
        if (package, name) in stand_ins:
            return stand_ins[package, name]
        if (module, name) == ("_codecs", "encode"):  # how protocols below 3 write bytes
            return _latin1
        raise PointCloudError(f"refused: the pickle asks for {module}.{name}, which is no part of an array")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise PointCloudError(f"refused: bytes in the encoding {encoding!r:.50}")
    return text.encode("latin1")


def load_modelnet40(path: str | Path) -> tuple[list[np.ndarray], list[int]]:
    """Clouds `[N, 6]` float32, xyz with black colours (normals are dropped), and labels, indices of `CLASSES`.

    Raises:
        PointCloudError: another kind of file, or the pickle asks for anything but arrays.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = _Reader(file, encoding="latin1").load()
        clouds, labels = content
        arrays = [cloud.numpy() for cloud in clouds]
        numbers = [int(label if isinstance(label, int) else label.numpy().reshape(-1)[0]) for label in labels]
    except PointCloudError as error:
        raise PointCloudError(f"{path}: {error}") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, MemoryError) as error:
        raise PointCloudError(f"{path}: not a pickle of clouds and labels ({error})") from error
    if len(arrays) != len(numbers) or any(array.ndim != 2 or array.shape[1] < 3 for array in arrays):
        raise PointCloudError(f"{path}: expected a cloud [N, 6] for every label")
    if not all(0 <= number < len(CLASSES) for number in numbers):
        raise PointCloudError(
            f"{path}: expected labels from 0 to {len(CLASSES) - 1}, got {min(numbers)} to {max(numbers)}"
        )
    black = []
    for array in arrays:
        cloud = np.zeros((len(array), 6), dtype=np.float32)
        cloud[:, :3] = array[:, :3]
        black.append(cloud)
    return black, numbers
