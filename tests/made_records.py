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


def made_split() -> list[dict]:
    """The training objects by their committed names, with sides, colours and symmetry drawn at random."""
    rng = np.random.default_rng(0)
    names, splits = committed_names(), catalogue.read_splits()
    records = []
    for object_id in sorted(name for name, entry in splits.items() if entry["split"] == "train"):
        name = names[object_id]
        sides = dict(zip(("width", "height", "depth"), rng.uniform(0.1, 2, 3).round(4).tolist(), strict=True))
        first, second = rng.permutation(list(facts.PALETTE))[:2].tolist()
        mirrors = {f"mirror_{ends}": [True, False, None][rng.integers(3)] for ends in ("left_right", "front_back")}
        records.append(
            {"object_id": object_id, "name": name.name, "head_noun": name.head, "noun_phrase": name.phrase}
            | {"plural": name.plural, "family": object_id, "category": "kitchen", "catalogue_scale": True}
            | {"colors": {first: 0.6, second: 0.3}}
            | sides
            | mirrors
            | {f"{side}_cm": 50 * length for side, length in sides.items()}
        )
    return records
