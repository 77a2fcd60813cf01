"""Edits of clouds `[N, 6]` (y up, colours in 0..1): those that leave an answer true, those that flip one, and noise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pointalign.data.point_cloud import turn
from pointalign.embedded.facts import MARGIN, PALETTE, colour_shares, main_colour

CLEARLY = 1.5  # by how much a stretched cloud is taller than wide, or wider than tall
SAMPLE = 2048  # points whose colours are counted to find the main colour of an edited cloud
NOISE_POINTS = 4096

Edit = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Group:
    """Edits of one kind, in order of strength, and the kinds of questions whose answers they leave true."""

    kinds: tuple[str, ...]
    levels: dict[str, Edit]


def turned(degrees: float) -> Edit:
    def edit(cloud: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([turn(cloud[:, :3], np.deg2rad(degrees)), cloud[:, 3:]], axis=1).astype(np.float32)

    return edit


def thinned(count: int) -> Edit:
    def edit(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return cloud[np.sort(rng.permutation(len(cloud))[:count])]

    return edit


def jittered(share: float) -> Edit:
    """Gaussian noise of that share of the radius in each coordinate."""

    def edit(cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noisy = cloud.copy()
        radius = np.linalg.norm(cloud[:, :3] - cloud[:, :3].mean(axis=0), axis=1).max()
        noisy[:, :3] += rng.normal(0, share * radius, size=(len(cloud), 3))
        return noisy

    return edit


def lit(factor: float) -> Edit:
    def edit(cloud: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([cloud[:, :3], np.clip(cloud[:, 3:] * factor, 0, 1)], axis=1)

    return edit


def greyed(cloud: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    grey = cloud[:, 3:] @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    return np.concatenate([cloud[:, :3], np.repeat(grey, 3, axis=1)], axis=1).astype(np.float32)


SIDES = ("taller or wider", "longest side")
INVARIANCES = {
    "yaw, degrees": Group(
        ("name", "colour", "taller or wider"), {str(angle): turned(angle) for angle in (45, 90, 180)}
    ),
    "points, of 8192": Group(
        ("name", "colour", *SIDES), {str(count): thinned(count) for count in (2048, 1024, 512)}
    ),
    "noise, % of the radius": Group(
        ("name", "colour", *SIDES), {f"{100 * share:g}": jittered(share) for share in (0.01, 0.02, 0.04)}
    ),
    "colour": Group(
        ("name", *SIDES), {"light x 0.6": lit(0.6), "light x 1.4": lit(1.4), "grey": greyed}
    ),
}  # fmt: skip


def stretched(cloud: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    """Stretched or flattened along the vertical, so that what is taller than wide becomes wider than tall, and back."""
    width, height, depth = np.ptp(cloud[:, :3], axis=0)
    tall = height > MARGIN * max(width, depth)
    wanted = min(width, depth) / CLEARLY if tall else max(width, depth) * CLEARLY
    edited = cloud.copy()
    edited[:, 1] *= wanted / height
    return edited


def recoloured(colour: str) -> Edit:
    """Every point takes a colour of the palette; what was lighter or darker stays so."""
    code = PALETTE[colour][0]
    rgb = np.array([int(code[place : place + 2], 16) for place in (1, 3, 5)]) / 255

    def edit(cloud: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
        shade = cloud[:, 3:].mean(axis=1, keepdims=True)
        shaded = np.clip(rgb + (shade - shade.mean()) / 2, 0, 1)
        return np.concatenate([cloud[:, :3], shaded], axis=1).astype(np.float32)

    return edit


def new_colour(record: dict, cloud: np.ndarray, rng: np.random.Generator) -> str | None:
    """A colour that `recoloured` turns the object into so that it is its main one; None where there is none.

    Args:
        record: with `colors` and `head_noun`; its colours are not taken.
    """
    colours = [colour for colour in PALETTE if colour not in record["colors"]]
    for colour in rng.permutation(colours):
        edited = recoloured(str(colour))(cloud, rng)
        shares = colour_shares(edited[rng.permutation(len(edited))[:SAMPLE], 3:])
        if main_colour({"head_noun": record["head_noun"], "colors": shares}) == colour:
            return str(colour)
    return None


def noise_cloud(rng: np.random.Generator) -> np.ndarray:
    """A cloud that shows nothing: points in a ball or a Gaussian blob, of a random box, in random colours."""
    xyz = rng.normal(size=(NOISE_POINTS, 3))
    if rng.random() < 0.5:  # evenly in the ball
        xyz *= rng.random((NOISE_POINTS, 1)) ** (1 / 3) / np.linalg.norm(xyz, axis=1, keepdims=True)
    xyz *= rng.uniform(0.5, 1, size=3)
    return np.concatenate([xyz, rng.random((NOISE_POINTS, 3))], axis=1).astype(np.float32)
