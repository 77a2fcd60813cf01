"""A cloud in memory as the model reads it: checked, subsampled, normalised."""

from typing import Any

import numpy as np

from pointalign.data.point_cloud import PointCloudError, normalise, subsample


def prepare_cloud(cloud: Any, num_points: int, min_points: int, num_channels: int = 6) -> np.ndarray:
    """`[min(N, num_points), num_channels]` float32, centred and scaled to the unit sphere.

    Args:
        cloud: `[N, num_channels]`, xyz and colours in 0..1; in double precision it is centred before it is rounded.
        min_points: the fewest points that the point encoder can group.

    Raises: PointCloudError: another shape, values that are not finite, colours out of range, or too few points.
    """
    points = np.asarray(cloud)
    points = points if points.dtype == np.float64 else points.astype(np.float32)
    if points.ndim != 2 or points.shape[1] != num_channels:
        raise PointCloudError(f"expected a cloud of shape [N, {num_channels}] (xyz, rgb), got {list(points.shape)}")
    if not np.isfinite(points).all():
        first = int(np.argwhere(~np.isfinite(points).all(axis=1))[0, 0])
        raise PointCloudError(f"point {first} of the cloud is NaN or infinite: {points[first].tolist()}")
    if num_channels == 6 and (points[:, 3:].min(initial=0) < 0 or points[:, 3:].max(initial=0) > 1):
        low, high = points[:, 3:].min(), points[:, 3:].max()
        raise PointCloudError(f"expected colours in 0..1, got {low:g} to {high:g}: divide 8-bit colours by 255")
    if len(points) < min_points:
        raise PointCloudError(
            f"expected a cloud of at least {min_points} points for the point encoder, got {len(points)}"
        )
    return normalise(subsample(points, num_points))
