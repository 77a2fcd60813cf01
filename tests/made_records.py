"""Records of embedded objects that tests make up, and the names of the real ones."""

import numpy as np
import trimesh

from pointalign.embedded import catalogue, facts


def box(width, height, depth, count=8192, colour=(0.9, 0.1, 0.1), seed=0):
    mesh = trimesh.creation.box((width, height, depth))
    points, _ = trimesh.sample.sample_surface(mesh, count, seed=seed)
    return catalogue.normalise(np.concatenate([points, np.tile(colour, (count, 1))], axis=1))


def record(points, name="box", size=(1, 1, 1), **extra):
    named = facts.read_name(name)
    return {
        "object_id": f"made-{name}",
        "name": named.name,
        "head_noun": named.head,
        "noun_phrase": named.phrase,
        "plural": named.plural,
        "category": "kitchen",
        "width_cm": size[0],
        "height_cm": size[1],
        "depth_cm": size[2],
        **facts.measure(points, size),
        **extra,
    }


def committed_names() -> dict[str, facts.ObjectName]:
    """Object id -> name of all embedded objects, from the titles in ATTRIBUTION.md."""
    text = (catalogue.SPLIT_FILE.parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return {object_id: facts.read_name(title, object_id) for object_id, title, *_ in rows}
