"""Augmentation of clouds while the point branch trains."""

import numpy as np


def augment(points: np.ndarray, rng: np.random.Generator, pose_free: bool = True, fewest: int = 2) -> np.ndarray:
    """A different view of the same object: resampled, turned, scaled and jittered.

    Args:
        points: `[N, 6]` float32, y up.
        rng: source of all randomness.
        pose_free: turn about the vertical axis and stretch by up to a tenth; off where words depend on pose and sides.
        fewest: resampling keeps at least so many points, where there are.

    Returns:
        `[M, 6]` float32, centred, with N / 4 <= M <= N; rgb changes in brightness only.
    """
    order = rng.permutation(len(points))
    points = points[order[: max(fewest, int(len(points) * rng.uniform(0.25, 1.0)))]].copy()
    points[:, :3] -= points[:, :3].mean(axis=0)  # a file may lie anywhere, jitter goes by the size of the object
    if pose_free:
        points[:, :3] = turn(points[:, :3], rng.uniform(0, 2 * np.pi))
        points[:, :3] *= rng.uniform(0.9, 1.1, size=3).astype(np.float32)
    radius = np.linalg.norm(points[:, :3], axis=1).max()
    points[:, :3] += rng.normal(0, 0.005 * radius, size=(len(points), 3))
    points[:, 3:] = np.clip(points[:, 3:] * rng.uniform(0.85, 1.15), 0, 1)
    return points.astype(np.float32)


def turn(xyz: np.ndarray, angle: float) -> np.ndarray:
    """Points `[N, 3]` turned about the vertical (y) axis by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return xyz @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], dtype=xyz.dtype)
