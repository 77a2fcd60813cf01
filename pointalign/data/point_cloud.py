"""Any point cloud or mesh file to coloured points [N, 6]: checked, y up, bounded before allocation; augmentation."""

import hashlib
import mmap
import struct
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pointalign.data.mesh import GREY, load_scene, sample_mesh
from pointalign.data.point_formats import POINT_READERS, Buffer, PointCloudError, RawPoints, ply_header

__all__ = ["FORMATS", "UP_AXES", "PointCloudError", "load_point_cloud", "normalise", "point_count", "subsample"]

FORMATS = (".npy", ".ply", ".obj", ".glb", ".gltf", ".stl", ".off", ".pcd", ".las")

# rows of the rotation that turns each up axis into +y
UP_AXES = {
    "x": ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
    "y": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "z": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "-x": ((0, 1, 0), (-1, 0, 0), (0, 0, 1)),
    "-y": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "-z": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
}

# Errors of trimesh, Pillow, json and numpy for malformed files. Pillow raises SyntaxError for a broken PNG chunk, numpy
# TokenError where it tries to read a .npy header as Python 2 wrote it.
_MALFORMED = (
    ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, OSError,
    EOFError, MemoryError, NameError, SyntaxError, struct.error, tokenize.TokenError,
)  # fmt: skip


def load_point_cloud(path: str | Path, up_axis: str = "y", num_points: int = 8192) -> np.ndarray:
    """Reads points (.npy, .ply, .pcd, .las) or samples the surface of a mesh (.ply, .obj, .glb, .gltf, .stl, .off).

    Args:
        path: the file; its suffix names the format. A .npy is [N, 3] (xyz) or [N, 6] (xyz + rgb).
        up_axis: the vertical axis of the file: x, y, z, -x, -y or -z; it is rotated onto +y.
        num_points: samples of a mesh, uniform by area, seeded by the content of the file. Of a point cloud all points
            are returned: `subsample` reduces them.

    Returns:
        [N, 6] float32: xyz as in the file (not normalised), rgb in 0..1. Colours in 0..255 (integers, or floats above
        1) and 16-bit colours are recognised; a file without colours gives mid-grey, 0.5. A cloud so far from the origin
        that float32 would lose detail (georeferenced .las) is moved to its centroid, as `normalise` does anyway.

    Raises:
        PointCloudError: the file is missing, empty, truncated, of unknown format or malformed; its header promises more
            than it holds; a number is NaN or infinite; a colour is out of range; fewer than two distinct points.
        ValueError: unknown `up_axis`.
    """
    if up_axis not in UP_AXES:
        raise ValueError(f"up_axis must be one of {', '.join(UP_AXES)}, got {up_axis!r}")
    path = Path(path)
    with _checked(path), np.errstate(all="ignore"):  # `_check_finite` finds an overflow
        raw = _read(path.read_bytes(), path, num_points)
        xyz = _single_precision(np.column_stack([*raw.xyz]))
        xyz = xyz @ np.array(UP_AXES[up_axis], np.float32).T
        rgb = np.full_like(xyz, GREY)
        if raw.rgb is not None:
            rgb = _unit_colours(np.column_stack([*raw.rgb]), raw.full_scale)
    return np.hstack([xyz, rgb])


def point_count(path: str | Path) -> int | None:
    """The number of points in the header of a file, checked against the file's size; None for a mesh.

    Binary files are mapped and not read beyond the header; text and compressed files are parsed.

    Raises: PointCloudError: as `load_point_cloud`, for faults that show in the header.
    """
    path = Path(path)
    with _checked(path), path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return None if _is_mesh(data, path) else len(POINT_READERS[path.suffix.lower()](data).xyz[0])


def normalise(points: np.ndarray) -> np.ndarray:
    """Centres xyz on the centroid and divides by the largest norm (unit sphere); other columns stay.

    Source: the preprocessing of PointLLM. `points` is [N, 3 + F], the result float32 and a copy.

    Raises: PointCloudError: all points are equal.
    """
    xyz = points[:, :3].astype(np.float64)
    xyz -= xyz.mean(axis=0)
    radius = np.linalg.norm(xyz, axis=1).max()
    if not radius > 0:
        raise PointCloudError("expected at least two distinct points to normalise, got one point or equal points")
    return np.hstack([xyz / radius, points[:, 3:]]).astype(np.float32)


def subsample(points: np.ndarray, num_points: int) -> np.ndarray:
    """At most `num_points` rows of `points` [N, C], in their order.

    A larger cloud is sampled uniformly without replacement, seeded by its content: the same cloud gives the same subset
    in training, chat and evaluation, on any machine.
    """
    if len(points) <= num_points:
        return points
    # raw PCG64 words, unlike Generator.choice, are the same in every numpy version
    words = np.random.PCG64(_seed(np.ascontiguousarray(points, "<f4"))).random_raw(len(points))
    return points[np.sort(np.argsort(words, kind="stable")[:num_points])]


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """Within the block every error that a file can cause is a PointCloudError that names it."""
    try:
        if path.suffix.lower() not in FORMATS:
            raise PointCloudError(f"unknown format {path.suffix!r}, expected one of {', '.join(FORMATS)}")
        if not path.is_file():
            raise PointCloudError("no such file")
        if path.stat().st_size == 0:
            raise PointCloudError("the file is empty")
        yield
    except PointCloudError as error:
        raise PointCloudError(f"{path}: {error}") from error
    except _MALFORMED as error:
        raise PointCloudError(f"{path}: unreadable {path.suffix} file ({type(error).__name__}: {error})") from error


def _is_mesh(data: Buffer, path: Path) -> bool:
    if path.suffix.lower() == ".ply":
        return any(element.name == "face" and element.count for element in ply_header(data)[1])
    return path.suffix.lower() not in POINT_READERS


def _read(data: Buffer, path: Path, num_points: int) -> RawPoints:
    if not _is_mesh(data, path):
        return POINT_READERS[path.suffix.lower()](data)
    x, y, z, *rgb = sample_mesh(load_scene(data, path), num_points, _seed(data)).T
    return RawPoints((x, y, z), (rgb[0], rgb[1], rgb[2]), 1.0)


def _seed(content) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:16], "little")


def _single_precision(xyz: np.ndarray) -> np.ndarray:
    """xyz [N, 3] as float32, finite and with an extent, about its centroid if float32 needs that."""
    if len(xyz) == 0:
        raise PointCloudError("the file holds no points")
    if xyz.dtype != np.float32:
        extent, farthest = np.ptp(xyz, axis=0).max(), np.abs(xyz).max()
        if extent > 0 and farthest * np.finfo(np.float32).eps > 1e-4 * extent:
            xyz = xyz - xyz.mean(axis=0)
    single = xyz.astype(np.float32)
    _check_finite(single, xyz, "coordinates")
    if (single == single[0]).all():
        raise PointCloudError(f"at least 2 distinct points are needed, got {len(xyz)} at {single[0].tolist()}")
    return single


def _unit_colours(rgb: np.ndarray, full_scale: float | None) -> np.ndarray:
    """rgb [N, 3] as float32 in 0..1; without a declared `full_scale`, integers and floats above 1 are 0..255."""
    _check_finite(rgb, rgb, "colours")
    low, high = float(rgb.min()), float(rgb.max())
    if full_scale is None:
        full_scale = 255.0 if rgb.dtype.kind in "iu" or high > 1.001 else 1.0
    elif full_scale == 65535.0 and high <= 255:
        full_scale = 255.0  # 8-bit colours in 16-bit fields, a habit of many .las writers
    if low < -1e-3 or high > full_scale * 1.001:
        bad = int(np.flatnonzero((rgb < -1e-3).any(axis=1) | (rgb > full_scale * 1.001).any(axis=1))[0])
        raise PointCloudError(
            f"colours must lie in 0..1, 0..255 or 16 bits; point {bad} has {rgb[bad].tolist()}, "
            f"the file ranges from {low:g} to {high:g} (normals are no colours: leave them out)"
        )
    return np.clip(rgb / full_scale, 0, 1).astype(np.float32)


def _check_finite(values: np.ndarray, original: np.ndarray, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise PointCloudError(
            f"point {bad[0]} has {what} {original[bad[0]].tolist()}: NaN, infinite or too large for float32; "
            f"{len(bad)} of {len(values)} points are, remove them"
        )


STRETCH = 0.15  # each axis is scaled by up to e^0.15 = 16 % either way, which keeps descriptions true
JITTER = 0.01  # highest standard deviation of the noise, as a share of the radius
TINT = 0.05  # highest shift of red, green and blue: too little to change a colour's name


def random_pose(rng: np.random.Generator, stretch: float = STRETCH) -> np.ndarray:
    """A matrix `[3, 3]` that mirrors, turns about the vertical and stretches points, as rows xyz times the matrix.

    Row k is the image of axis k; its length is the factor by which sides along that axis grow.
    """
    pose = np.eye(3, dtype=np.float32)
    pose[0] *= rng.choice([-1, 1])
    pose = turn(pose, rng.uniform(0, 2 * np.pi))
    return pose * np.exp(rng.uniform(-stretch, stretch, size=3)).astype(np.float32)


def augment(
    points: np.ndarray,
    rng: np.random.Generator,
    pose_free: bool = True,
    fewest: int = 2,
    pose: np.ndarray | None = None,
) -> np.ndarray:
    """Another view of the same object: resampled, mirrored, turned, stretched, with noise and other light.

    Args:
        points: `[N, 6]` float32, y up.
        rng: source of all randomness.
        pose_free: change the pose too; off where the text depends on pose and sides.
        fewest: resampling leaves at least this many points of a cloud that has them.
        pose: `[3, 3]`, the change of the pose; by default random.

    Returns: `[M, 6]` float32, centred, with N / 4 <= M <= N.
    """
    count = max(fewest, int(len(points) * rng.uniform(0.25, 1.0)))
    points = points[rng.permutation(len(points))[:count]].copy()
    points[:, :3] -= points[:, :3].mean(axis=0)  # centred first: the noise is a share of the object's radius
    if pose_free:
        points[:, :3] = points[:, :3] @ (random_pose(rng) if pose is None else pose)
    radius = np.linalg.norm(points[:, :3], axis=1).max()
    points[:, :3] += rng.normal(0, rng.uniform(0, JITTER) * radius, size=(len(points), 3))
    light, tint = rng.uniform(0.8, 1.2), rng.uniform(-TINT, TINT, size=3)
    points[:, 3:] = np.clip(points[:, 3:] * light + tint, 0, 1)
    return points.astype(np.float32)


def turn(xyz: np.ndarray, angle: float) -> np.ndarray:
    """Points `[N, 3]` turned about the vertical (y) axis by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return xyz @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], dtype=xyz.dtype)
