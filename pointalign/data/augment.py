"""Augmentation of clouds while the point branch trains."""

import numpy as np

STRETCH = 0.15  # of each axis, up to e^0.15 = 16 % either way
JITTER = 0.01  # standard deviation of the noisiest views, of the radius
TINT = 0.05  # added to each of red, green and blue: too little to change a colour's name


def augment(points: np.ndarray, rng: np.random.Generator, pose_free: bool = True, fewest: int = 2) -> np.ndarray:
    """A different view of the same object: resampled, mirrored, turned, stretched, jittered, in another light.

    Args:
        points: `[N, 6]` float32, y up.
        rng: source of all randomness.
        pose_free: mirror, turn about the vertical axis and stretch; off where words depend on pose and sides.
        fewest: resampling keeps at least so many points, where there are.

    Returns:
        `[M, 6]` float32, centred, with N / 4 <= M <= N.
    """
    count = max(fewest, int(len(points) * rng.uniform(0.25, 1.0)))
    points = points[rng.permutation(len(points))[:count]].copy()
    points[:, :3] -= points[:, :3].mean(axis=0)  # a file may lie anywhere, jitter goes by the size of the object
    if pose_free:
        points[:, 0] *= rng.choice([-1, 1])
        points[:, :3] = turn(points[:, :3], rng.uniform(0, 2 * np.pi))
        points[:, :3] *= np.exp(rng.uniform(-STRETCH, STRETCH, size=3)).astype(np.float32)
    radius = np.linalg.norm(points[:, :3], axis=1).max()
    points[:, :3] += rng.normal(0, rng.uniform(0, JITTER) * radius, size=(len(points), 3))
    light, tint = rng.uniform(0.8, 1.2), rng.uniform(-TINT, TINT, size=3)
    points[:, 3:] = np.clip(points[:, 3:] * light + tint, 0, 1)
    return points.astype(np.float32)


def turn(xyz: np.ndarray, angle: float) -> np.ndarray:
    """Points `[N, 3]` turned about the vertical (y) axis by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return xyz @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], dtype=xyz.dtype)
