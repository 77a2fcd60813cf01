"""Any point cloud or mesh file to coloured points [N, 6]: checked, y up, bounded before allocation; augmentation."""

import hashlib
import logging
import mmap
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pointalign.data.mesh import PARTS, MeshOptions, load_scene, sample_mesh
from pointalign.data.ply import ply_header
from pointalign.data.point_formats import POINT_READERS
from pointalign.data.point_records import Buffer, PointCloudError, RawPoints

__all__ = [
    "FORMATS", "MISSING_COLORS", "UP_AXES", "Cloud", "PointCloudError", "Reading", "load_point_cloud",
    "memory_bound", "normalise", "point_count", "read_point_cloud", "subsample",
]  # fmt: skip

FORMATS = (
    ".npy", ".ply", ".obj", ".glb", ".gltf", ".stl", ".off", ".pcd", ".las", ".laz", ".npz", ".xyz", ".pts", ".csv",
    ".txt",
)  # fmt: skip
OTHER_FORMATS = (  # of clouds and meshes; they are not read
    ".3ds", ".3mf", ".abc", ".amf", ".blend", ".dae", ".drc", ".dxf", ".e57", ".fbx", ".ksplat", ".pth", ".pt", ".pkl",
    ".ptx", ".splat", ".spz", ".step", ".stp", ".usd", ".usda", ".usdc", ".usdz", ".vtk", ".vtp", ".wrl", ".x3d",
)  # fmt: skip
READ_FORMATS = f"expected one of {', '.join(FORMATS)}; convert a mesh to .glb, points to .ply"
MISSING_COLORS = {"black": 0.0, "grey": 0.5, "white": 1.0}

# rows of the rotation that turns each up axis into +y
UP_AXES = {
    "x": ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
    "y": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "z": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "-x": ((0, 1, 0), (-1, 0, 0), (0, 0, 1)),
    "-y": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "-z": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
}

# Errors of trimesh, Pillow, json, zipfile and numpy for malformed files. Pillow raises SyntaxError for a broken PNG
# chunk, numpy TokenError where it tries to read a .npy header as Python 2 wrote it.
_MALFORMED = (
    ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, OSError,
    EOFError, MemoryError, NameError, SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_MAPPED_BYTES = 1 << 26  # larger files are mapped, not copied into memory
_BLOCK = 1 << 18  # points converted at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How files are read (`--data.up_axis` and so on): what a file does not say, and what may be left out of it.

    Attributes:
        up_axis: the vertical axis of the files: x, y, z, -x, -y or -z; it is rotated onto +y.
        missing_color: colour of points that have none: black (what the published encoders saw of ModelNet40), grey or
            white.
        max_nonfinite: the largest share of points that are NaN, infinite or too large for float32 and are left out; a
            file with more of them is refused. Empty pixels of an organised .pcd do not count.
        parts: what is used of a file with points and surfaces: points, mesh (samples of the surfaces) or all.

    Raises: ValueError: names the option and its choices.
    """

    up_axis: str = "y"
    missing_color: str = "black"
    max_nonfinite: float = 0.05
    parts: str = "points"

    def __post_init__(self) -> None:
        for name, choices in (("up_axis", UP_AXES), ("missing_color", MISSING_COLORS), ("parts", PARTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 <= self.max_nonfinite < 1:
            raise ValueError(f"max_nonfinite must be a share from 0 to below 1, got {self.max_nonfinite}")


class Cloud(NamedTuple):
    """Points [N, 6] float32, and what was left out or assumed of the file, for the user."""

    points: np.ndarray
    notes: tuple[str, ...]


def load_point_cloud(
    path: str | Path,
    up_axis: str = "y",
    num_points: int = 8192,
    *,
    missing_color: str = "black",
    max_nonfinite: float = 0.05,
    parts: str = "points",
) -> np.ndarray:
    """Reads points, or samples the surface of a mesh; what is left out of the file is logged as a warning.

    Args:
        path: the file; its suffix names the format, one of `FORMATS`.
        num_points: samples of a mesh, uniform by area, seeded by the content of the file. Of a point cloud all points
            are returned: `subsample` reduces them.
        up_axis, missing_color, max_nonfinite, parts: see `Reading`.

    Returns:
        [N, 6] float32: xyz as in the file (not normalised), rgb in 0..1. Colours in 0..255 (integers, or floats above
        1) and 16-bit colours are recognised. A cloud so far from the origin that float32 would lose detail
        (georeferenced files) is moved to its centroid in double precision, as `normalise` does anyway.

    Raises:
        PointCloudError: the file is missing, empty, truncated, of unknown format or malformed; its header promises more
            than it holds; too many numbers are NaN or infinite; a colour is out of range; fewer than two distinct
            points.
        ValueError: an unknown choice of an option.
    """
    cloud = read_point_cloud(path, Reading(up_axis, missing_color, max_nonfinite, parts), num_points)
    for note in cloud.notes:
        logger.warning("%s: %s", path, note)
    return cloud.points


def read_point_cloud(path: str | Path, reading: Reading, num_points: int = 8192) -> Cloud:
    """As `load_point_cloud`, with the notes returned and not logged: for callers that read files again and again."""
    path = Path(path)
    with _checked(path), np.errstate(all="ignore"):  # `_assemble` finds an overflow
        return _assemble(_read(_content(path), path, reading, num_points), reading)


def _content(path: Path) -> Buffer:
    if path.stat().st_size <= _MAPPED_BYTES:
        return path.read_bytes()
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def memory_bound(path: str | Path) -> int:
    """Bytes of memory that reading a file may take at most, by its size; measured peaks are a fraction of it.

    A mesh has no more than 128 times the size of its file and of the files beside it that it names, points have 32
    times; both have 512 MB beside, which the pixels of a texture or what a compressed file unpacks to may need.
    """
    path = Path(path)
    factor = 32 if path.suffix.lower() in POINT_READERS else 128
    return factor * path.stat().st_size + (1 << 29)


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
            raise PointCloudError(f"unknown format {path.suffix!r}, {READ_FORMATS}")
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


def _read(data: Buffer, path: Path, reading: Reading, num_points: int) -> RawPoints:
    if not _is_mesh(data, path):
        return POINT_READERS[path.suffix.lower()](data)
    scene, notes = load_scene(data, path)
    missing = MISSING_COLORS[reading.missing_color]
    sampled = sample_mesh(scene, MeshOptions(num_points, reading.parts, missing, reading.max_nonfinite), _seed(data))
    x, y, z, *rgb = sampled.points.T
    return RawPoints((x, y, z), (rgb[0], rgb[1], rgb[2]), 1.0, notes=(*notes, *sampled.notes))


def _seed(content) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:16], "little")


class _Survey(NamedTuple):
    """What a pass over the points tells: the rows to use, the ranges and sums of the usable coordinates and colours."""

    usable: np.ndarray  # [N] bool
    dropped: int
    low: np.ndarray  # [6]
    high: np.ndarray  # [6]
    mean: np.ndarray  # [3]


def _assemble(raw: RawPoints, reading: Reading) -> Cloud:
    """Columns as points: bad ones left out, centred in double precision where needed, turned y up, colours in 0..1.

    The columns are converted block by block, so that beside them and the result nothing of their size is in memory.
    """
    if len(raw.xyz[0]) == 0:
        raise PointCloudError("the file holds no points")
    survey = _survey(raw, reading.max_nonfinite)
    scale = None if raw.rgb is None else _full_scale(raw, survey)
    extent = (survey.high - survey.low)[:3].max()
    farthest = max(abs(survey.low[:3]).max(), abs(survey.high[:3]).max())
    single = all(column.dtype == np.float32 for column in raw.xyz) and raw.scale is None
    # a millionth of the extent is what float32 resolves of a cloud at the origin, within a factor of ten
    far = not single and extent > 0 and farthest * np.finfo(np.float32).eps > 1e-6 * extent
    centre = survey.mean if far else np.zeros(3)
    rotation = np.array(UP_AXES[reading.up_axis], np.float64).T

    points = np.empty((int(survey.usable.sum()), 6), np.float32)
    points[:, 3:] = MISSING_COLORS[reading.missing_color]
    done = 0
    for start in range(0, len(survey.usable), _BLOCK):
        rows = survey.usable[start : start + _BLOCK]
        block = slice(start, start + _BLOCK)
        xyz = _coordinates(raw, block)[rows] - centre
        points[done : done + len(xyz), :3] = xyz @ rotation
        if raw.rgb is not None:
            rgb = np.column_stack([column[block] for column in raw.rgb])[rows]
            points[done : done + len(xyz), 3:] = np.clip(rgb / scale, 0, 1)
        done += len(xyz)
    if (points[:, :3] == points[0, :3]).all():
        raise PointCloudError(f"at least 2 distinct points are needed, got {len(points)} at {points[0, :3].tolist()}")
    notes = raw.notes
    if survey.dropped:
        notes += (f"{survey.dropped} of {len(survey.usable)} points are NaN, infinite or too large; left out",)
    return Cloud(points, notes)


def _coordinates(raw: RawPoints, block: slice) -> np.ndarray:
    """[n, 3] float64."""
    xyz = np.column_stack([np.asarray(column[block], np.float64) for column in raw.xyz])
    return xyz if raw.scale is None else xyz * raw.scale + raw.offset


def _survey(raw: RawPoints, max_nonfinite: float) -> _Survey:
    """Raises: PointCloudError: more than the share `max_nonfinite` of the points is not finite, or all are."""
    total = len(raw.xyz[0])
    usable = np.ones(total, bool) if raw.keep is None else raw.keep.copy()
    low, high, sums = np.full(6, np.inf), np.full(6, -np.inf), np.zeros(3)
    first, dropped = None, 0
    for start in range(0, total, _BLOCK):
        block = slice(start, start + _BLOCK)
        values = _coordinates(raw, block)
        good = (np.abs(values) <= np.finfo(np.float32).max).all(axis=1)  # false for NaN too
        if raw.rgb is not None:
            rgb = np.column_stack([np.asarray(column[block], np.float64) for column in raw.rgb])
            values = np.hstack([values, rgb])
            good &= np.isfinite(rgb).all(axis=1)
        bad = usable[block] & ~good
        if first is None and bad.any():
            first = start + int(np.flatnonzero(bad)[0])
        dropped += int(bad.sum())
        usable[block] &= good
        values = values[usable[block]]
        if len(values):
            width = values.shape[1]
            low[:width] = np.minimum(low[:width], values.min(axis=0))
            high[:width] = np.maximum(high[:width], values.max(axis=0))
            sums += values[:, :3].sum(axis=0)
    number = int(usable.sum())
    if first is not None and (number == 0 or (dropped > max_nonfinite * (number + dropped) and not raw.holes)):
        where = slice(first, first + 1)
        xyz = _coordinates(raw, where)[0]
        is_place = not (np.abs(xyz) <= np.finfo(np.float32).max).all() or raw.rgb is None
        what = f"coordinates {xyz.tolist()}" if is_place else f"colours {[c[first].item() for c in raw.rgb or ()]}"
        raise PointCloudError(
            f"point {first} has {what}: NaN, infinite or too large for float32; {dropped} of {number + dropped} points "
            f"are, more than --data.max_nonfinite {max_nonfinite:g} allows to leave out"
        )
    return _Survey(usable, dropped, low, high, sums / max(number, 1))


def _full_scale(raw: RawPoints, survey: _Survey) -> float:
    """The value of full colour; where no type declares it, integers and floats above 1 are 0..255.

    Raises: PointCloudError: a colour is out of range; names the first such point.
    """
    assert raw.rgb is not None
    low, high = float(survey.low[3:].min()), float(survey.high[3:].max())
    full_scale = raw.full_scale
    if full_scale is None:
        full_scale = 255.0 if raw.rgb[0].dtype.kind in "iu" or high > 1.001 else 1.0
    elif full_scale == 65535.0 and high <= 255:
        full_scale = 255.0  # 8-bit colours in 16-bit fields, a habit of many .las writers
    if low < -1e-3 or high > full_scale * 1.001:
        wrong = [(column < -1e-3) | (column > full_scale * 1.001) for column in raw.rgb]
        bad = int(np.flatnonzero((wrong[0] | wrong[1] | wrong[2]) & survey.usable)[0])
        raise PointCloudError(
            f"colours must lie in 0..1, 0..255 or 16 bits; point {bad} has {[c[bad].item() for c in raw.rgb]}, "
            f"the file ranges from {low:g} to {high:g} (normals are no colours: leave them out)"
        )
    return full_scale


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
