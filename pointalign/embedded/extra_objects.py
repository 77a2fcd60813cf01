"""More labelled objects for training a point encoder: household things of the Debian package minetest-mod-homedecor.

The package holds OBJ models without materials, and Lua files that assign textures to them or describe objects as boxes,
see `lua_definitions`. The names of the objects, textures that cannot be read from there, and the colours of textures of
other packages are in `furniture_data/homedecor.json`. `build_extra_objects` writes

    clouds/{object_id}_8192.npy   [8192, 6] float32, xyz in the unit sphere (y up) + rgb in 0..1
    objects.json                  one record per object: what `facts.facts` reads, its name, creator and licence

The objects serve training alone: no test and no evaluation reads them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.embedded.catalogue import POINTS, UNTEXTURED, normalise, sample_surface
from pointalign.embedded.facts import colour_shares, read_name, seed_of
from pointalign.embedded.lua_definitions import Look, Tile, read_colour, read_looks, read_tile

TABLE_FILE = Path(__file__).parent / "furniture_data" / "homedecor.json"
SIDES = (  # of a box, in the order of its tiles: axis and end, then axis and sign of the texture's u and of its v
    (1, 1, (0, 1), (2, 1)),
    (1, 0, (0, 1), (2, -1)),
    (0, 1, (2, 1), (1, 1)),
    (0, 0, (2, -1), (1, 1)),
    (2, 1, (0, -1), (1, 1)),
    (2, 0, (0, 1), (1, 1)),
)
Z_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # turns a model that stands along z: (x, y, z) -> (x, z, -y)
LICENSE, CREATOR = "CC-BY-SA-4.0", "Vanessa Ezekowitz and contributors of homedecor_modpack"
OTHER_AUTHORS = {  # start of the model's name -> creator and SPDX licence, by the package's copyright file
    "lavalamp": ("thefamilygrog66", "WTFPL"),
    "plasmascreen": ("qwrwed", "WTFPL"),
}


@cache
def table() -> dict[str, dict]:
    """The committed table.

    "objects": model file, or registered name of an object made of boxes -> name, or {"name", "tiles", "z_up"}.
    "tiles" replaces what the Lua files say: texture names, followed by "#rrggbb" if they are coloured. "z_up": the
    model lies on its back, for the game turns it.
    "colours": texture of another package -> "#rrggbb".
    """
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------------- models


def boxes_model(boxes: Sequence[Sequence[float]]) -> str:
    """The OBJ text of boxes (x0, y0, z0, x1, y1, z1), with a group for each direction, in the order of the tiles.

    Textures lie on the sides as on those of the unit cube about the origin. The boxes are left-handed, unlike models.
    """
    lines, count = [], 0
    for group, (axis, end, (u_axis, u_sign), (v_axis, v_sign)) in enumerate(SIDES):
        lines.append(f"g {group}")
        for box in boxes:
            corner = [0.0, 0.0, 0.0]
            corner[axis] = box[axis + 3 * end]
            for u_end, v_end in ((0, 0), (1, 0), (1, 1), (0, 1)):
                corner[u_axis], corner[v_axis] = box[u_axis + 3 * u_end], box[v_axis + 3 * v_end]
                lines.append(f"v {-corner[0]} {corner[1]} {corner[2]}")
                lines.append(f"vt {u_sign * corner[u_axis] + 0.5} {v_sign * corner[v_axis] + 0.5}")
            lines.append("f " + " ".join(f"{count + k}/{count + k}" for k in (1, 2, 3, 4)))
            count += 4
    return "\n".join(lines) + "\n"


def with_materials(model: str) -> tuple[str, int]:
    """An OBJ file's text with a material, part0, part1 ..., for every group that has faces; and their number."""
    lines, parts, has_faces = ["mtllib parts.mtl", "usemtl part0"], 1, False
    for line in model.splitlines():
        word = line.split(maxsplit=1)[:1]
        if word in (["mtllib"], ["usemtl"], ["o"]):
            continue
        if word == ["g"] and has_faces:
            line, parts, has_faces = f"usemtl part{parts}", parts + 1, False
        elif word == ["f"]:
            has_faces = True
        if word != ["g"] or line.startswith("usemtl"):
            lines.append(line)
    return "\n".join(lines) + "\n", parts


def _texture(tile: Tile, path: Path) -> bytes:
    """The tile's texture, its first frame if it is animated, times its colour; as a PNG file."""
    from PIL import Image

    image = Image.open(path).convert("RGBA")
    if tile.frame:
        width, height = tile.frame
        image = image.crop((0, 0, image.width, round(image.width * height / width)))
    pixels = np.asarray(image) * np.array([*tile.colour, 1.0])
    packed = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(packed, "PNG")
    return packed.getvalue()


def load_scene(model: str, tiles: Sequence[Tile], textures: dict[str, Path]) -> Any:
    """The model as a `trimesh.Scene`, one geometry per group. A model with more groups than tiles repeats the last.

    Args:
        model: the text of an OBJ file.
        tiles: one per group; where there are none, the model is grey.
        textures: file name -> file. A texture that is not there counts as its colour of the table, else as grey.
    """
    import trimesh
    from trimesh.resolvers import ZipResolver

    text, parts = with_materials(model)
    files, materials = {}, []
    for part in range(parts):
        tile = tiles[min(part, len(tiles) - 1)] if tiles else Tile("")
        materials.append(f"newmtl part{part}")
        if tile.texture in textures:
            files[f"part{part}.png"] = io.BytesIO(_texture(tile, textures[tile.texture]))
            materials.append(f"map_Kd part{part}.png")
        else:
            code = table()["colours"].get(tile.texture)
            plain = (1.0, 1.0, 1.0) if tile.colour != (1.0, 1.0, 1.0) and not tile.texture else UNTEXTURED
            colour = np.array(read_colour(code) if code else plain) * tile.colour
            materials.append("Kd " + " ".join(f"{value:.4f}" for value in colour))
    files["parts.mtl"] = io.BytesIO("\n".join(materials).encode())
    resolver = ZipResolver(files)
    return trimesh.load_scene(io.BytesIO(text.encode()), file_type="obj", resolver=resolver, process=False)


# ------------------------------------------------------------------------------------------------------------ the build


def read_objects(package: Path) -> Iterator[tuple[dict, np.ndarray]]:
    """The objects of the committed table, in its order: record and cloud [8192, 6].

    Args:
        package: a folder with the package's OBJ, PNG and Lua files, at any depth.

    Raises: ValueError: the package lacks a model of the table, or a model's surface cannot be sampled.
    """
    models = {path.name: path for path in sorted(package.rglob("*.obj"))}
    textures = {path.name: path for path in sorted(package.rglob("*.png"))}
    scripts = {str(path): path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.lua"))}
    looks = read_looks(scripts)
    if missing := table()["objects"].keys() - models.keys() - looks.keys():
        raise ValueError(f"{package}: expected {len(table()['objects'])} objects, but {min(missing)} is missing")
    for key, entry in table()["objects"].items():
        entry = {"name": entry} if isinstance(entry, str) else entry
        look = looks.get(key, Look())
        tiles = [read_tile(f'"{tile}"', {}) for tile in entry["tiles"]] if "tiles" in entry else look.tiles
        model = models[key].read_text(encoding="latin-1") if key in models else boxes_model(look.boxes)
        words = re.findall(r"[a-z0-9]+", key.removeprefix("homedecor_").removesuffix(".obj"))
        object_id = "-".join(["homedecor", *words])
        points = sample_surface(load_scene(model, tiles, textures), POINTS, seed_of(object_id))
        if entry.get("z_up"):
            points[:, :3] @= Z_UP.T
        cloud = normalise(points)
        authors = [author for start, author in OTHER_AUTHORS.items() if key.startswith(start)]
        creator, license = authors[0] if authors else (CREATOR, LICENSE)
        width, height, depth = np.ptp(cloud[:, :3].astype(np.float64), axis=0).round(4).tolist()
        record = {
            "object_id": object_id,
            "name": entry["name"],
            "head_noun": read_name(entry["name"]).head,
            "category": "",
            "creator": creator,
            "license": license,
            "colors": colour_shares(cloud[:, 3:]),
            "width": width,
            "height": height,
            "depth": depth,
        }
        yield record, cloud


def build_extra_objects(package: Path, out: Path, training_nouns: Collection[str]) -> int:
    """Write `clouds/` and `objects.json` into the folder `out`; returns the number of objects.

    Args:
        package: see `read_objects`.
        training_nouns: the head nouns that training may teach. Objects with another noun have the head noun None: they
            serve only to compare shapes.
    """
    (out / "clouds").mkdir()
    records = []
    for record, cloud in read_objects(package):
        if record["head_noun"] not in training_nouns:
            record["head_noun"] = None
        np.save(out / "clouds" / f"{record['object_id']}_{POINTS}.npy", cloud)
        records.append(record)
    (out / "objects.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return len(records)
