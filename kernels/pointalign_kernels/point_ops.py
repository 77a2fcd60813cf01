"""Farthest-point sampling, nearest neighbours and grouping: one function per op, `impl` chooses how it runs.

`impl="native"` is the compiled library of `csrc/` (CPU and, where it was built with CUDA, NVIDIA GPUs),
`impl="reference"` the plain PyTorch of `reference.py`, and `impl="auto"` native where that can run. Both give the same
indices, bit for bit, on every device, batch size and thread count.
"""

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from pointalign_kernels import reference

IMPLEMENTATIONS = ("auto", "reference", "native")
GROUP_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger(__name__)


def _load_library() -> str | None:
    """Loads the compiled ops from this file's folder; returns the reason where that is not possible, else None."""
    libraries = sorted(Path(__file__).parent.glob("_native*.so"))
    if not libraries:
        return "pointalign_kernels was installed without its compiled library"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the compiled library does not load ({error.__cause__ or error})"
    return None


_load_error = _load_library()
_ops = torch.ops.pointalign_kernels
NATIVE_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda")
    if _load_error is None
    and torch._C._dispatch_has_kernel_for_dispatch_key("pointalign_kernels::group_points", device.upper())
)

if _load_error is None:

    @torch.library.register_fake("pointalign_kernels::farthest_point_sample")
    def _(points, num_samples, start_index, lengths):
        return points.new_empty((points.shape[0], num_samples), dtype=torch.int64)

    @torch.library.register_fake("pointalign_kernels::knn")
    def _(query, points, k, lengths):
        shape = (*query.shape[:2], k)
        return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)

    @torch.library.register_fake("pointalign_kernels::group_points")
    def _(points, centre_index, k, lengths, dtype):
        return points.new_empty((*centre_index.shape, k, points.shape[2]), dtype=dtype)


@functools.cache
def _warn_once(device: str, text: str) -> None:
    logger.warning("point ops on %s run as plain PyTorch, which is slow: %s", device, text)


def _runs_native(impl: str, points: Tensor, *others: Tensor) -> bool:
    """Whether `impl` means the compiled ops here. Raises: ValueError, RuntimeError: "native" and they cannot run."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return False
    device = points.device.type
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (points, *others)):
        if impl == "native":
            raise ValueError("impl='native' has no gradient: detach the points or ask for impl='reference'")
        return False
    if device in NATIVE_DEVICES:
        return True
    reason = _load_error or f"the compiled library was built without {device}"
    if impl == "native":
        raise RuntimeError(f"impl='native' cannot run on {device}: {reason}; build it with POINTALIGN_BUILD={device}")
    if not torch.compiler.is_compiling():
        _warn_once(device, f"{reason} (POINTALIGN_BUILD={device} builds it)")
    return False


def _check_finite(native: bool, points: Tensor, lengths: Tensor | None, name: str = "points") -> None:
    """Raise ValueError for NaN or infinite coordinates. Native CPU ops check by themselves; CUDA would synchronise."""
    if points.device.type == "cpu" and not native and not torch.compiler.is_compiling():
        reference.require_finite(points, lengths, name)


_MANY = 32  # columns of a point; a tensor [B, 3, N] has more


def _check_shape(points: Tensor, name: str = "points", expected: str = "[B, N, 3 + F]") -> None:
    """Raises: ValueError: no batch of clouds, or one with the coordinates in the second place."""
    if points.ndim == 3 and points.shape[2] >= 3 and not (points.shape[1] == 3 and points.shape[2] > _MANY):
        return
    hint = ""
    if points.ndim == 3 and points.shape[1] == 3:
        hint = f": this looks like [B, 3, N], pass {name}.transpose(1, 2)"
    elif points.ndim == 2:
        hint = f": pass {name}[None] for a single cloud"
    raise ValueError(f"{name}: expected {expected}, got {list(points.shape)}{hint}")


def _near_origin(points: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Coordinates in double precision that float32 would round, relative to the first point of their cloud.

    The ops compute in float32 and need differences only: a cloud in metres of a map would lose its shape.
    """
    if points.dtype != torch.float64 or points.numel() == 0 or torch.compiler.is_compiling():
        return points, *others
    xyz = points[..., :3]
    if torch.equal(xyz.float().double().nan_to_num(), xyz.nan_to_num()):
        return points, *others
    origin = xyz[:, :1]
    return tuple(
        torch.cat([tensor[..., :3].double() - origin, tensor[..., 3:].double()], dim=-1) for tensor in (points, *others)
    )


def farthest_point_sample(
    points: Tensor, num_samples: int, start_index: int = 0, lengths: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Greedy farthest-point sampling: each new sample is the point farthest from all samples so far.

    Args:
        points: `[B, N, 3 + F]`, xyz first; computed in fp32, of fp64 points relative to the cloud's first one.
        num_samples: K, at least 1.
        start_index: the first sample of every cloud (the last point where a cloud is shorter).
        lengths: `[B]` int64, the number of points of each cloud, 1 to N; None means N.
        impl: "auto", "reference" or "native".

    Returns:
        `[B, K]` int64. Ties go to the lowest index; duplicates are allowed; places at or past the length of a cloud
        repeat its last sample.

    Raises:
        ValueError: a shape, an index or, on a CPU, a coordinate is not usable; the message names the first bad point.
        RuntimeError: `impl="native"` where the compiled library cannot run.
    """
    _check_shape(points)
    (points,) = _near_origin(points)
    native = _runs_native(impl, points)
    _check_finite(native, points, lengths)
    if native:
        return _ops.farthest_point_sample(points.float(), num_samples, start_index, lengths)
    return reference.farthest_point_sample(points, num_samples, start_index, lengths)


def knn(
    query: Tensor, points: Tensor, k: int, lengths: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k nearest points of every query.

    Args:
        query: `[B, Q, 3]`.
        points: `[B, N, 3 + F]`, xyz first; distances are direct fp32 differences, never an expanded square.
        k: neighbours per query, at least 1.
        lengths, impl: as in `farthest_point_sample`.

    Returns:
        squared distance `[B, Q, k]` fp32 and index `[B, Q, k]` int64, sorted by (distance, index). Places at or past
        the length of a cloud repeat the last neighbour.

    Raises: ValueError, RuntimeError: as `farthest_point_sample`.
    """
    _check_shape(query, "query", "[B, Q, 3]")
    _check_shape(points)
    if query.shape[0] == points.shape[0] and points.dtype == torch.float64:
        points, query = _near_origin(points, query)
    native = _runs_native(impl, points, query)
    _check_finite(native, points, lengths)
    _check_finite(native, query, None, "query")
    if native:
        return _ops.knn(query.float(), points.float(), k, lengths)
    return reference.knn(query, points, k, lengths)


def group_points(
    points: Tensor,
    centre_index: Tensor,
    k: int,
    lengths: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The neighbourhoods of chosen centres, gathered and centred.

    Args:
        points: `[B, N, 3 + F]`, xyz first.
        centre_index: `[B, G]` int64, rows of `points`.
        k: neighbours per centre, at least 1.
        dtype: of the result: float32, float16 or bfloat16; None means that of `points`, float32 for float64 and
            integers. Differences are fp32.
        lengths, impl: as in `farthest_point_sample`.

    Returns:
        `[B, G, k, 3 + F]`: the k nearest points of each centre in the order of `knn`, xyz relative to the centre,
        features as they are.

    Raises: ValueError, RuntimeError: as `farthest_point_sample`.
    """
    _check_shape(points)
    if centre_index.ndim != 2 or centre_index.shape[0] != points.shape[0] or centre_index.dtype != torch.int64:
        raise ValueError(
            f"centre_index: expected int64 [B, G] with B = {points.shape[0]}, got {centre_index.dtype} "
            f"{list(centre_index.shape)}"
        )
    (points,) = _near_origin(points)
    if dtype is None:
        dtype = points.dtype if points.dtype in GROUP_DTYPES else torch.float32
    if dtype not in GROUP_DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(str(choice) for choice in GROUP_DTYPES)}")
    native = _runs_native(impl, points)
    _check_finite(native, points, lengths)
    if native:
        return _ops.group_points(points.float(), centre_index, k, lengths, dtype)
    return reference.group_points(points, centre_index, k, lengths, dtype)
