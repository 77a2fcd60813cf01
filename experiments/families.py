"""The committed split and the attribution file of the embedded objects.

    python -m experiments.families CATALOGUE_FOLDER

writes `furniture_data/splits.json` (object id -> family, split), `furniture_data/ATTRIBUTION.md` and the small clouds
of `tests/clouds`. Objects so alike that one gives away the answer about another are one family, and no family is in two
splits:

- same creator, and same name without counts, sizes, shapes, colours, materials, poses and trailing phrases
  ("sofa 2 seats" and "sofa 3 seats"; a series of wall sockets);
- same head noun, by any creator, and clouds that differ by little more than two samples of one surface.

Of exact duplicates (the same mesh in the same colours) only the first stays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

from pointalign.embedded.annotations import conversations
from pointalign.embedded.catalogue import (
    POINTS,
    SPLIT_FILE,
    SPLITS,
    CatalogueEntry,
    describe_object,
    load_scene,
    read_catalogues,
    sample_object,
)
from pointalign.embedded.facts import PALETTE, read_name

SHARES = (0.64, 0.11, 0.25)  # a quarter for the test: with fewer families the intervals would be too wide
SAMPLES = {
    f"blend-swap-cc-0-{name}"
    for name in (
        "bench",
        "cactus",
        "fireextinguisher",
        "forklift",
        "motorbike",
        "plasticchair",
        "pooltable",
        "teddybear",
    )
}
TOLERANCE = 0.015  # of the shares, in objects and in families
NEAR = 1.5  # Chamfer distance below which two clouds are near duplicates, in units of their sampling error
MODIFIERS = set(PALETTE) | set(
    "small large little big high low upper lower corner round rounded square rectangular oval double triple quadruple "
    "arched sliding double-hung open closed folding old modern glass wooden plastic rattan iron concrete stone snowy "
    "sitting standing lying male female wall network antenna light dimmer electric gas".split()
)


def core_name(name: str) -> str:
    """The name without what varies inside a series: "double wall socket" -> "socket", "bowl with fruit" -> "bowl"."""
    words = re.split(r" (?:with|of|on|under|for) ", name.lower())[0].split()
    return " ".join([w for w in words[:-1] if w not in MODIFIERS and not w.isdigit()] + words[-1:])


def mesh_digest(entry: CatalogueEntry) -> str:
    """Equal for two objects with the same surface in the same colours, wherever it stands in the file."""
    parts = []
    for mesh in load_scene(entry).dump(concatenate=False):
        material = getattr(mesh.visual, "material", None)
        image = getattr(material, "image", None)
        colour = b""
        if material is not None:
            colour = image.tobytes() if image is not None else np.asarray(material.main_color).tobytes()
        shape = np.round(np.asarray(mesh.triangles) - mesh.bounds.mean(0), 4)
        parts.append(hashlib.sha256(np.ascontiguousarray(shape).tobytes() + colour).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def near_pairs(clouds: dict[str, np.ndarray], heads: dict[str, str]) -> list[tuple[str, str]]:
    """Pairs of clouds [N, 3] of one head noun whose Chamfer distance is under NEAR times their sampling error.

    Each cloud is cut into two disjoint halves, so that the distance between the halves of one cloud is that error. The
    search is by k-d trees in float64: `neighbours.chamfer` squares float32 norms, which is too coarse this close to 0.
    """
    ids = sorted(clouds)
    halves = {i: (clouds[i][0:4096:2], clouds[i][1:4096:2]) for i in ids}
    trees = {i: KDTree(halves[i][1]) for i in ids}
    error = {i: trees[i].query(halves[i][0])[0].mean() for i in ids}
    sides = np.stack([np.ptp(clouds[i], axis=0) for i in ids])
    pairs = []
    for a, first in enumerate(ids):
        for b in np.flatnonzero((np.abs(sides[a + 1 :] - sides[a]) < 0.05).all(1)) + a + 1:
            second = ids[b]
            if heads[first] != heads[second]:
                continue
            there = trees[second].query(halves[first][0])[0].mean()
            back = trees[first].query(halves[second][0])[0].mean()
            if there + back < NEAR * (error[first] + error[second]):
                pairs.append((first, second))
    return pairs


def group(keys: dict[str, str], pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Object id -> family name: ids with one key are one family, and `pairs` join families (the first name stays)."""
    parent = {key: key for key in keys.values()}

    def find(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    for first, second in pairs:
        a, b = sorted((find(keys[first]), find(keys[second])))
        parent[b] = a
    return {object_id: find(key) for object_id, key in keys.items()}


def split_of(family: str, salt: int) -> str:
    """The split a family belongs to, by the hash of its name."""
    fraction = int.from_bytes(hashlib.sha256(f"{salt}/{family}".encode()).digest()[:8], "big") / 2**64
    return SPLITS[int(np.searchsorted(np.cumsum(SHARES[:-1]), fraction, side="right"))]


def balanced_salt(families: dict[str, str]) -> int:
    """The first salt under which objects and families are shared out as SHARES asks; families differ much in size."""
    for salt in range(10_000):
        for members in (list(families.values()), sorted(set(families.values()))):
            counts = Counter(split_of(family, salt) for family in members)
            if any(abs(counts[s] / len(members) - share) > TOLERANCE for s, share in zip(SPLITS, SHARES, strict=True)):
                break
        else:
            return salt
    raise ValueError("no salt shares the families out evenly: the largest family is too large")


def family_key(entry: CatalogueEntry) -> str:
    return re.sub(
        r"[^a-z0-9]+", "-", f"{entry.creator} {core_name(read_name(entry.title, entry.object_id).name)}".lower()
    ).strip("-")


def _inspect(entry: CatalogueEntry) -> tuple[str, np.ndarray]:
    return mesh_digest(entry), sample_object(entry)[:, :3]


def attribution(entries: list[CatalogueEntry], ids: set[str]) -> str:
    """The text of ATTRIBUTION.md."""
    lines = [
        "# Attribution",
        "",
        "The embedded default uses the works below, fetched at set-up; samples of some objects are in `tests/clouds`.",
        "",
        "## Models",
        "",
        "- SmolLM2-135M-Instruct, Hugging Face, Apache-2.0 (converted from its Q4_1 GGUF to bf16 safetensors)",
        "- all-MiniLM-L6-v2, sentence-transformers, Apache-2.0",
        "",
        "## Further objects, of the recipes that name them",
        "",
        "`pointalign.assets.extra_objects` builds more objects, which only trainings whose recipe names them use:",
        "household things of the Minetest mods [homedecor_modpack](https://gitlab.com/VanessaE/homedecor_modpack),",
        "version of 2021-03-27, by Vanessa Ezekowitz and contributors,",
        "[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/); of it the lava lamp by thefamilygrog66",
        "and the television by qwrwed, WTFPL. Changes: sampled as coloured point clouds, turned upright, centred",
        "and scaled; textures of other packages replaced by plain colours. Whoever publishes a checkpoint trained",
        "on them names them in its attribution.",
        "",
        "## Objects",
        "",
        "3D models of the Sweet Home 3D furniture libraries 1.8, collected and converted to OBJ by Emmanuel Puybaret /",
        "eTeks. Changes: sampled as coloured point clouds, centred and scaled. Licences:",
        "[CC0-1.0](https://creativecommons.org/publicdomain/zero/1.0/),",
        "[CC-BY-3.0](https://creativecommons.org/licenses/by/3.0/),",
        "[CC-BY-3.0-US](https://creativecommons.org/licenses/by/3.0/us/).",
        "",
        "| object | title | creator | licence |",
        "|---|---|---|---|",
    ]
    rows = [f"| {e.object_id} | {e.title} | {e.creator} | {e.license} |" for e in entries if e.object_id in ids]
    return "\n".join(lines + rows) + "\n"


def write_samples(entries: list[CatalogueEntry], splits: dict[str, dict[str, str]], folder: Path) -> None:
    """The first 2048 points of a few CC0 objects in float16, and their annotations, as a tiny data set for tests."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for entry in entries:
        if entry.object_id in SAMPLES:
            points = sample_object(entry)
            np.save(folder / f"{entry.object_id}_{POINTS}.npy", points[:2048].astype(np.float16))
            records.append(describe_object(entry, points, **splits[entry.object_id]))
    (folder / "annotations.json").write_text(json.dumps(conversations(records), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the committed split and attribution of the embedded objects.")
    parser.add_argument("catalogues", type=Path, help="folder with the .sh3f catalogues")
    folder = parser.parse_args().catalogues
    entries = read_catalogues(folder)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        inspected = dict(zip([e.object_id for e in entries], pool.map(_inspect, entries, chunksize=4), strict=True))
    first_with: dict[str, str] = {}
    for object_id, (digest, _) in inspected.items():
        first_with.setdefault(digest, object_id)
    unique = set(first_with.values())
    heads = {entry.object_id: read_name(entry.title, entry.object_id).head for entry in entries}
    pairs = near_pairs({object_id: inspected[object_id][1] for object_id in unique}, heads)
    families = group({e.object_id: family_key(e) for e in entries if e.object_id in unique}, pairs)
    salt = balanced_salt(families)
    splits = {i: {"family": family, "split": split_of(family, salt)} for i, family in sorted(families.items())}
    rows = [f" {json.dumps(object_id)}: {json.dumps(value)}" for object_id, value in splits.items()]
    SPLIT_FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    SPLIT_FILE.with_name("ATTRIBUTION.md").write_text(attribution(entries, unique), encoding="utf-8")
    write_samples(entries, splits, Path("tests/clouds"))
    members = defaultdict(set)
    for value in splits.values():
        members[value["split"]].add(value["family"])
    for split in SPLITS:
        count = sum(value["split"] == split for value in splits.values())
        print(f"{split}: {count} objects in {len(members[split])} families")
    print(f"{len(entries) - len(unique)} exact duplicates dropped, {len(pairs)} near-duplicate pairs")


if __name__ == "__main__":
    main()
