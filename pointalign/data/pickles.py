"""Arrays inside pickles, read without running what a pickle asks for."""

import io
import pickle
import pickletools
import struct
from typing import Any

import numpy as np

from pointalign.data.point_records import PointCloudError

# What `pickle` and the stand-ins raise of a malformed stream.
MALFORMED_PICKLE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError,
    RecursionError, struct.error,
)  # fmt: skip
_TYPES = {"f2", "f4", "f8", "i4", "i8", "u1", "u2"}


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


class Array:
    """Stands for numpy.ndarray, however the pickle builds it."""

    def __init__(self, *state: Any):
        self.state = state

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def items(self) -> list[Any] | None:
        """What an array of Python objects holds; None of an array of numbers."""
        match self.state:
            case (int(), tuple(), _Type(name="O8" | "O4" | "O"), bool() | int(), list(values)):
                return values
        return None

    def numpy(self) -> np.ndarray:
        """Raises: PointCloudError: no array of numbers, or its data do not fill its shape."""
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


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package = module.replace("numpy._core", "numpy.core")
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),
            ("numpy.core.multiarray", "scalar"): Array,
            ("numpy.core.numeric", "_frombuffer"): Array,
            ("numpy", "ndarray"): Array,
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


def read_pickle(data: bytes) -> Any:
    """What a pickle holds, with `Array` in the place of every numpy array; anything but plain data is refused.

    It takes at most about 72 times the memory of `data`, which many small lists and dicts reach.

    Raises: PointCloudError, and `MALFORMED_PICKLE`.
    """
    for opcode, argument, place in pickletools.genops(data):
        # the unpickler allocates its memo up to the number that the stream names
        if "PUT" in opcode.name and argument is not None and int(argument) > len(data):
            raise PointCloudError(f"refused: byte {place} of the pickle numbers an object {argument}")
        if "SET" in opcode.name and "ITEM" not in opcode.name:  # an empty set takes 216 bytes of memory
            raise PointCloudError(f"refused: byte {place} of the pickle makes a set, which is no part of an array")
    return _Reader(io.BytesIO(data), encoding="latin1").load()
