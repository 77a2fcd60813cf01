"""The embedded objects: Sweet Home 3D furniture catalogues -> coloured point clouds in the field's own file formats.

A catalogue (`.sh3f`) is a zip archive with a Java properties file (ISO-8859-1 with `\\uXXXX` escapes, by the format's
definition) and one OBJ + MTL + textures folder per object. `build_objects` writes what PointLLM-style training reads:

    clouds/{object_id}_8192.npy          [8192, 6] float32, xyz in the unit sphere (y up) + rgb in 0..1
    annotations/{train,validation,test}.json
    objects.json                         one record of facts per object
    procedural.json                      records of procedural objects, which the training part is asked about too

Coordinates follow the catalogue: after its `modelRotation`, x is the object's width, y its height, z its depth.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pointalign.embedded.annotations import conversations
from pointalign.embedded.facts import measure, read_name, seed_of
from pointalign.embedded.procedural import MAKERS, procedural_object
from pointalign.embedded.procedural_questions import procedural_record

POINTS = 8192
SPLITS = ("train", "validation", "test")
SPLIT_FILE = Path(__file__).parent / "furniture_data" / "splits.json"
FOLDS = 5
FOLD_SALT = 530  # the first salt that gives every fold a fifth of objects and of families, within 0.015
LICENSES = {  # catalogue -> SPDX licence of its models (file LICENSE.TXT inside each)
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}
UNTEXTURED = np.array([0.5, 0.5, 0.5])  # colour of a mesh part without material
OPAQUE = 0.5  # texels with less alpha are left out, such as those around the leaves of plants


@dataclass(frozen=True)
class CatalogueEntry:
    """One object of a catalogue. `size_cm` is its real (width, height, depth)."""

    object_id: str
    title: str
    category: str
    creator: str
    license: str
    archive: Path
    model: str  # path of the OBJ file inside the archive
    size_cm: tuple[float, float, float]
    rotation: tuple[float, ...]  # 3 x 3, row by row


def read_properties(data: bytes) -> dict[str, str]:
    """Parse a Java properties file of `key=value` lines."""
    pairs = (line.split("=", 1) for line in data.decode("latin-1").splitlines() if "=" in line and line[0] not in "#!")
    return {
        key.strip(): re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value).replace("\\", "").strip()
        for key, value in pairs
    }


def read_catalogue(archive: Path) -> list[CatalogueEntry]:
    """All objects of one `.sh3f` file, in the catalogue's order. Raises ValueError on an unknown catalogue."""
    if archive.stem not in LICENSES:
        raise ValueError(f"{archive.name}: expected a catalogue with a known licence, one of {', '.join(LICENSES)}")
    with zipfile.ZipFile(archive) as files:
        properties = read_properties(files.read("PluginFurnitureCatalog.properties"))
    entries = []
    for number in sorted(int(key[3:]) for key in properties if key.startswith("id#")):
        get = {key: properties.get(f"{key}#{number}", "") for key in ("id", "name", "category", "creator", "model")}
        rotation = properties.get(f"modelRotation#{number}", "1 0 0 0 1 0 0 0 1").split()
        width, height, depth = (float(properties[f"{key}#{number}"]) for key in ("width", "height", "depth"))
        entries.append(
            CatalogueEntry(
                object_id=re.sub(r"[^a-z0-9]+", "-", get["id"].lower()).strip("-"),
                title=get["name"],
                category=get["category"],
                creator=get["creator"],
                license=LICENSES[archive.stem],
                archive=archive,
                model=get["model"].lstrip("/"),
                size_cm=(width, height, depth),
                rotation=tuple(map(float, rotation)),
            )
        )
    return entries


def read_catalogues(folder: Path) -> list[CatalogueEntry]:
    """The objects of all catalogues in `folder`, sorted by object id. Raises ValueError if two share an id."""
    entries = [entry for name in LICENSES for entry in read_catalogue(folder / f"{name}.sh3f")]
    ids = [entry.object_id for entry in entries]
    if len(set(ids)) != len(ids):
        raise ValueError(f"object ids are not unique: {sorted({i for i in ids if ids.count(i) > 1})}")
    return sorted(entries, key=lambda entry: entry.object_id)


# ---------------------------------------------------------------------------------------------------------- sampling


def load_scene(entry: CatalogueEntry) -> Any:
    """The object's mesh parts as a `trimesh.Scene`, one geometry per material."""
    import trimesh
    from trimesh.resolvers import ZipResolver

    logging.getLogger("trimesh").setLevel(logging.CRITICAL)  # where a texture is missing, the material's colour serves
    folder = str(PurePosixPath(entry.model).parent) + "/"
    with zipfile.ZipFile(entry.archive) as files:
        siblings = {n[len(folder) :]: io.BytesIO(files.read(n)) for n in files.namelist() if n.startswith(folder)}
    model = siblings[PurePosixPath(entry.model).name]
    resolver = ZipResolver(siblings)
    return trimesh.load_scene(model, file_type="obj", resolver=resolver, process=False)


def _texels(image, uv: np.ndarray) -> np.ndarray:
    """Bilinear texture lookup with repeat: uv [N, 2], v up -> rgba [N, 4] in 0..1."""
    texture = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    height, width = texture.shape[:2]
    x = np.mod(uv[:, 0], 1) * width - 0.5
    y = np.mod(1 - uv[:, 1], 1) * height - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    x0, x1, y0, y1 = x0 % width, (x0 + 1) % width, y0 % height, (y0 + 1) % height
    top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    bottom = texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def _part_colours(mesh, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """rgba [N, 4] at the points with barycentric `weights` [N, 3] on `faces` [N].

    A texture replaces the material's diffuse colour instead of being multiplied with it: the catalogues' textured
    materials carry the exporter's default grey there.
    """
    material = getattr(mesh.visual, "material", None)
    uv = None if material is None else mesh.visual.uv
    if getattr(material, "image", None) is not None and uv is not None and len(uv) == len(mesh.vertices):
        corners = np.asarray(uv, dtype=np.float64)[mesh.faces[faces]]  # [N, 3, 2]
        return _texels(material.image, np.einsum("nk,nkc->nc", weights, corners))
    rgb = UNTEXTURED if material is None else np.asarray(material.main_color, dtype=np.float64)[:3] / 255
    return np.tile(np.append(rgb, 1.0), (len(faces), 1))


def sample_surface(scene, count: int, seed: int) -> np.ndarray:
    """Area-weighted samples of a scene's surface: [count, 6] float64, xyz in the scene's frame + rgb in 0..1.

    Points on transparent texels are drawn again. Raises ValueError if the surface has no area or is all transparent.
    """
    rng = np.random.default_rng(seed)
    parts = [mesh for mesh in scene.dump(concatenate=False) if len(getattr(mesh, "faces", ()))]
    if not parts:
        raise ValueError("the model has no faces to sample")
    triangles = np.concatenate([np.asarray(mesh.triangles, dtype=np.float64) for mesh in parts])  # [F, 3, 3]
    areas = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)
    cumulative = np.cumsum(areas)
    if not cumulative[-1] > 0:
        raise ValueError("the model's surface has no area to sample")
    starts = np.cumsum([0] + [len(mesh.faces) for mesh in parts])
    samples: list[np.ndarray] = []
    for _ in range(20):
        missing = count - sum(map(len, samples))
        if missing == 0:
            return np.concatenate(samples)
        faces = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
        faces = np.minimum(faces, len(areas) - 1)
        r1, r2 = np.sqrt(rng.random(count)), rng.random(count)
        weights = np.stack([1 - r1, r1 * (1 - r2), r1 * r2], axis=1)
        xyz = np.einsum("nk,nkc->nc", weights, triangles[faces])
        rgba = np.empty((count, 4))
        for mesh, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
            here = (faces >= start) & (faces < end)
            if here.any():
                rgba[here] = _part_colours(mesh, faces[here] - start, weights[here])
        visible = rgba[:, 3] >= OPAQUE
        samples.append(np.concatenate([xyz, rgba[:, :3]], axis=1)[visible][:missing])
    raise ValueError("the model's surface is transparent nearly everywhere")


def normalise(points: np.ndarray) -> np.ndarray:
    """Subtract the centroid of xyz and divide by the largest norm; other columns stay. [N, 3 + F] float32."""
    xyz = points[:, :3] - points[:, :3].mean(0)
    xyz = xyz / np.linalg.norm(xyz, axis=1).max()
    return np.concatenate([xyz, points[:, 3:]], axis=1).astype(np.float32)


def sample_object(entry: CatalogueEntry) -> np.ndarray:
    """The object's cloud [8192, 6] float32, normalised, with the catalogue's rotation applied (y up)."""
    points = sample_surface(load_scene(entry), POINTS, seed_of(entry.object_id))
    points[:, :3] @= np.array(entry.rotation).reshape(3, 3).T
    return normalise(points)


# ---------------------------------------------------------------------------------------------------------- the build


def read_splits() -> dict[str, dict[str, str]]:
    """The committed split: object id -> {"family", "split"}; exact duplicates are absent from it."""
    return json.loads(SPLIT_FILE.read_text(encoding="utf-8"))


def _build_object(entry: CatalogueEntry, family: str, split: str, clouds: Path) -> dict:
    points = sample_object(entry)
    np.save(clouds / f"{entry.object_id}_{POINTS}.npy", points)
    return describe_object(entry, points, family, split)


def describe_object(entry: CatalogueEntry, points: np.ndarray, family: str, split: str) -> dict:
    """The object's record in `objects.json`."""
    name = read_name(entry.title, entry.object_id)
    width, height, depth = entry.size_cm
    return {
        "object_id": entry.object_id,
        "name": name.name,
        "head_noun": name.head,
        "noun_phrase": name.phrase,
        "plural": name.plural,
        "family": family,
        "split": split,
        "category": entry.category.lower(),
        "creator": entry.creator,
        "license": entry.license,
        "width_cm": width,
        "height_cm": height,
        "depth_cm": depth,
        **measure(points, entry.size_cm),
    }


def build_objects(catalogues: Path, out: Path, progress: Callable[[list], Iterable] = iter) -> dict[str, int]:
    """Sample, measure and describe every object of the committed split; returns the number of objects per split.

    Args:
        catalogues: folder with the five `.sh3f` files.
        out: folder to write `clouds/`, `annotations/` and `objects.json` into.
        progress: wraps the list of pending objects, e.g. `tqdm`.

    Raises ValueError if the catalogues lack an object of the committed split.
    """
    splits = read_splits()
    entries = [entry for entry in read_catalogues(catalogues) if entry.object_id in splits]
    if missing := splits.keys() - {entry.object_id for entry in entries}:
        raise ValueError(f"the catalogues lack {len(missing)} objects of the committed split, e.g. {min(missing)}")
    clouds = out / "clouds"
    clouds.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # forking a process that runs torch threads can deadlock
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        jobs = [pool.submit(_build_object, entry, **splits[entry.object_id], clouds=clouds) for entry in entries]
        records = [job.result() for job in progress(jobs)]
    (out / "procedural.json").write_text(json.dumps(write_procedural_clouds(clouds), indent=1), encoding="utf-8")
    write_annotations(records, out, SPLITS)
    return {split: sum(record["split"] == split for record in records) for split in SPLITS}


def write_procedural_clouds(clouds: Path) -> list[dict]:
    """Write a procedural object of every noun that has a generator, `[POINTS, 6]` each; returns their records."""
    records = []
    for noun in MAKERS:
        object_id = f"procedural-{noun.replace(' ', '-')}"
        record, points = procedural_object(noun, np.random.default_rng(seed_of(object_id)), POINTS)
        np.save(clouds / f"{object_id}_{POINTS}.npy", normalise(points))
        records.append(procedural_record(record, object_id))
    return records


def write_annotations(records: list[dict], out: Path, splits: Iterable[str]) -> None:
    """Write `objects.json` and, for each of the splits that the records name, `annotations/{split}.json`.

    The training part is also asked about the procedural objects of `procedural.json` whose noun it has: they cover what
    the catalogues have few of, and are the only ones that know their legs.
    """
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    (out / "objects.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    trained = {record["head_noun"] for record in records if record["split"] == "train"}
    procedural = json.loads((out / "procedural.json").read_text(encoding="utf-8"))
    for split in splits:
        entries = conversations([record for record in records if record["split"] == split])
        if split == "train":
            entries += conversations([record for record in procedural if record["head_noun"] in trained])
        (out / "annotations" / f"{split}.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- folds


def fold_of(family: str) -> int:
    """The fold that holds a family out, 0 to FOLDS - 1, by the hash of its name."""
    return int.from_bytes(hashlib.sha256(f"fold/{FOLD_SALT}/{family}".encode()).digest()[:8], "big") % FOLDS


def write_fold(built: Path, fold: int, out: Path) -> None:
    """Write the built objects under another split: this fold is the test part, the other four the training part.

    Args:
        built: the folder that `build_objects` wrote.
        out: a new folder two levels below it, for `objects.json`, `annotations/{train,test}.json` and a link to the
            clouds.
    """
    records = json.loads((built / "objects.json").read_text(encoding="utf-8"))
    part = {record["object_id"]: "test" if fold_of(record["family"]) == fold else "train" for record in records}
    records = [record | {"split": part[record["object_id"]]} for record in records]
    out.mkdir(parents=True)
    (out / "procedural.json").symlink_to(Path("..", "..", "procedural.json"))
    write_annotations(records, out, ("train", "test"))
    (out / "clouds").symlink_to(Path("..", "..", "clouds"), target_is_directory=True)
