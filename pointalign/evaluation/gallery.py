"""Clouds as small pictures, drawn by depth without a graphics library."""

import base64
import io

import numpy as np

from pointalign.data.augment import turn
from pointalign.data.point_cloud import normalise

BACKGROUND = (0.87, 0.89, 0.92)  # neither white nor black: most objects are one of them
VIEWS = ((0.0, 0.15), (np.pi / 2, 0.15), (np.pi / 4, 0.6))  # turn about the vertical axis and tilt, radians


def render(cloud: np.ndarray, size: int = 150) -> np.ndarray:
    """A cloud `[N, 6]` (y up, colours in 0..1) from three views, side by side: `[size, 3 * size, 3]` uint8."""
    cloud = normalise(cloud)
    return np.concatenate([_view(cloud, size, yaw, tilt) for yaw, tilt in VIEWS], axis=1)


def _view(cloud: np.ndarray, size: int, yaw: float, tilt: float) -> np.ndarray:
    xyz = turn(cloud[:, :3], yaw)
    cos, sin = np.cos(tilt), np.sin(tilt)
    up, toward = xyz[:, 1] * cos - xyz[:, 2] * sin, xyz[:, 1] * sin + xyz[:, 2] * cos
    column = ((xyz[:, 0] * 0.47 + 0.5) * size).astype(int)
    row = ((0.5 - up * 0.47) * size).astype(int)
    shade = 0.72 + 0.28 * (toward + 1) / 2  # what is farther is darker
    colours = np.clip(cloud[:, 3:6], 0, 1) * shade[:, None]
    image = np.empty((size, size, 3))
    image[:] = BACKGROUND
    order = np.argsort(toward, kind="stable")  # near points are painted last
    for down in (0, 1, 2):
        for right in (0, 1, 2):
            image[np.clip(row[order] + down, 0, size - 1), np.clip(column[order] + right, 0, size - 1)] = colours[order]
    return (image * 255).round().astype(np.uint8)


def as_data_url(image: np.ndarray) -> str:
    """An image `[H, W, 3]` uint8 as the `src` of an `<img>`, PNG with 64 colours."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).quantize(64).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
