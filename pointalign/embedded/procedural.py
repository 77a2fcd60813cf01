"""Procedural objects: endless labelled clouds of common objects, put together from simple parts.

A catalogue shows a few doors and beds, and an encoder learns those by heart. Stage 1 mixes these clouds with the real
ones, the training part asks about some of them, and no test does. `MAKERS` holds nouns of training objects that a few
simple parts can show.

Lengths are in metres, as the objects are in a house; clouds are scaled to the unit sphere before a model sees them.
"""

from collections.abc import Callable

import numpy as np

from pointalign.embedded.facts import colour_shares
from pointalign.embedded.procedural_containers import CONTAINERS
from pointalign.embedded.procedural_devices import DEVICES
from pointalign.embedded.procedural_figures import FIGURES
from pointalign.embedded.procedural_furniture import FURNITURE
from pointalign.embedded.procedural_household import HOUSEHOLD
from pointalign.embedded.procedural_outdoors import OUTDOORS
from pointalign.embedded.procedural_parts import Draw, Part
from pointalign.embedded.procedural_rooms import ROOMS
from pointalign.embedded.procedural_small import SMALL
from pointalign.embedded.procedural_structures import STRUCTURES
from pointalign.embedded.procedural_things import THINGS
from pointalign.embedded.procedural_vehicles import VEHICLES

MAKERS: dict[str, Callable[[Draw], list[Part]]] = {
    **FURNITURE, **ROOMS, **HOUSEHOLD, **OUTDOORS, **SMALL, **STRUCTURES, **FIGURES, **VEHICLES, **DEVICES, **THINGS,
    **CONTAINERS,
}  # fmt: skip


def procedural_object(noun: str, rng: np.random.Generator, points: int = 1024) -> tuple[dict, np.ndarray]:
    """A random object of that noun, which is of `MAKERS`.

    Returns:
        what `facts.facts` reads of it, with "legs" where they can be counted, and its points `[points, 6]` float32:
        metres, y up, area-weighted, rgb in 0..1.
    """
    parts = MAKERS[noun](Draw(rng))
    areas = np.array([part.areas.sum() for part in parts])
    counts = rng.multinomial(points, areas / areas.sum())
    xyz = np.concatenate([part.sample(n, rng) for part, n in zip(parts, counts, strict=True)])
    rgb = np.repeat([part.colour for part in parts], counts, axis=0)
    cloud = np.concatenate([xyz, rgb], axis=1)[rng.permutation(points)].astype(np.float32)
    sides = dict(zip(("width", "height", "depth"), np.ptp(xyz, axis=0).tolist(), strict=True))
    colours = colour_shares(cloud[:128, 3:])  # there are few colours, so a sample will do
    record = {"head_noun": noun, "colors": colours, "category": "", **sides}
    if num_legs := sum(part.leg for part in parts):
        record["legs"] = num_legs
    return record, cloud
