"""Augmentation of clouds while the point branch trains."""

import numpy as np

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

    Returns:
        `[M, 6]` float32, centred, with N / 4 <= M <= N.
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
