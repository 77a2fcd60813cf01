"""More labelled objects for training a point encoder: household things of the Debian package minetest-mod-homedecor.

The package holds OBJ models without materials. Lua files assign textures to them, in the form

    mesh = "homedecor_desk.obj",
    tiles = { homedecor.plain_wood, "homedecor_desk_drawers.png", { name = "metal.png", color = 0xff303030 } },

where the n-th tile belongs to the n-th group of the model. What a regular expression cannot read there, such as names
put together in a loop, is in `furniture_data/homedecor.json`, as are the names of the objects and the colours of
textures that belong to other packages. `build_extra_objects` writes

    clouds/{object_id}_8192.npy   [8192, 6] float32, xyz in the unit sphere (y up) + rgb in 0..1
    objects.json                  one record per object: what `facts.facts` reads, its name, creator and licence

The objects serve training alone: no test and no evaluation reads them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.embedded.catalogue import POINTS, UNTEXTURED, normalise, sample_surface
from pointalign.embedded.facts import colour_shares, read_name, seed_of

TABLE_FILE = Path(__file__).parent / "furniture_data" / "homedecor.json"
Z_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # turns a model that stands along z: (x, y, z) -> (x, z, -y)
LICENSE, CREATOR = "CC-BY-SA-4.0", "Vanessa Ezekowitz and contributors of homedecor_modpack"
OTHER_AUTHORS = {  # start of the model's name -> creator and SPDX licence, by the package's copyright file
    "lavalamp": ("thefamilygrog66", "WTFPL"),
    "plasmascreen": ("qwrwed", "WTFPL"),
}
COMMENT = re.compile(r"--\[\[.*?\]\]|--[^\n]*", re.DOTALL)
VALUE = r'("[^"\n]+\.png[^"\n]*"|\{[^{}\n]*\.png[^{}\n]*\}|0x[0-9a-fA-F]{8})'
VARIABLE = re.compile(r"(?:\blocal[ \t]+(\w+)|\b(\w+\.[\w.]+))[ \t]*=[ \t]*" + VALUE)
MESH = re.compile(r"""\bmesh\s*=\s*["']([\w.-]+\.obj)["']\s*(?=[,}])""")
TILES = re.compile(r"\btiles\s*=\s*\{")
ITEM = re.compile(r"\s*(\{(?:[^{}]|\{[^{}]*\})*\}|[^,{}]+)\s*(?:,|$)")
TEXTURE = re.compile(r"""["']\(?([\w.-]+\.png)[^"']*["']""")  # of layers, the lowest
COLOUR = re.compile(r"(?:\bcolor\s*=\s*)?0x[0-9a-fA-F]{2}([0-9a-fA-F]{6})\b|\.png#([0-9a-fA-F]{6})")
FRAMES = re.compile(r"aspect_w\s*=\s*(\d+).*?aspect_h\s*=\s*(\d+)", re.DOTALL)


@dataclass(frozen=True)
class Tile:
    """The look of a model's group: a texture, "" for none, times a colour. `frame` is (width, height) of an animation's
    frames, which lie one above the other in the texture.
    """

    texture: str
    colour: tuple[float, ...] = (1.0, 1.0, 1.0)
    frame: tuple[int, int] | None = None


@cache
def table() -> dict[str, dict]:
    """The committed table.

    "objects": model file -> name, or {"name", "tiles", "z_up"}. "tiles" replaces what the Lua files say: texture names,
    followed by "#rrggbb" if they are coloured. "z_up": the model lies on its back, for the
    game turns it.
    "colours": texture of another package -> "#rrggbb".
    """
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


def _rgb(code: str) -> tuple[float, ...]:
    """The colour of "rrggbb" or "#rrggbb", in 0..1."""
    return tuple(int(code.lstrip("#")[i : i + 2], 16) / 255 for i in (0, 2, 4))


# ------------------------------------------------------------------------------------------------------------ Lua files


def read_variables(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """File -> name -> expression of every variable that is set to a texture or a colour; the first value counts.

    Names with a dot, such as `homedecor.plain_wood`, are known in all files.
    """
    variables: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    for file, text in texts.items():
        file_names = variables.setdefault(file, {})
        for match in VARIABLE.finditer(text):
            (file_names if match[1] else shared).setdefault(match[1] or match[2], match[3])
    return {file: shared | names for file, names in variables.items()}


def read_tile(expression: str, variables: dict[str, str]) -> Tile:
    """A tile as Lua writes it: a name in quotes, a table with `name` and `color`, or a variable that holds either."""
    expression = re.sub(r"[A-Za-z_][\w.]*", lambda name: variables.get(name[0], name[0]), expression)
    texture, colour, frames = TEXTURE.search(expression), COLOUR.search(expression), FRAMES.search(expression)
    return Tile(
        texture[1] if texture else "",
        _rgb(colour[1] or colour[2]) if colour else (1.0, 1.0, 1.0),
        (int(frames[1]), int(frames[2])) if frames else None,
    )


def _end_of_table(text: str, start: int) -> int:
    """Position after the brace that closes the one at `start`; the text's end if none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place + 1
    return len(text)


def _start_of_table(text: str, place: int) -> int:
    """Position of the brace that opens the table around `place`, or 0."""
    depth = 0
    for start in range(place - 1, -1, -1):
        depth += (text[start] == "{") - (text[start] == "}")
        if depth == 1:
            return start
    return 0


def read_tiles(texts: dict[str, str]) -> dict[str, list[Tile]]:
    """Model file -> its tiles, from the text of Lua files; the first definition of a model that names a texture counts.

    Args:
        texts: file name -> text.
    """
    texts = {file: COMMENT.sub("", text) for file, text in texts.items()}
    variables = read_variables(texts)
    tiles: dict[str, list[Tile]] = {}
    for file, text in texts.items():
        for mesh in MESH.finditer(text):
            start = _start_of_table(text, mesh.start())
            field = TILES.search(text, start, _end_of_table(text, start))
            if not field:
                continue
            inside = text[field.end() : _end_of_table(text, field.end() - 1) - 1]
            read = [read_tile(item[1], variables[file]) for item in ITEM.finditer(inside) if item[1].strip()]
            if any(tile.texture for tile in read):
                tiles.setdefault(mesh[1], read)
    return tiles


# --------------------------------------------------------------------------------------------------------------- models


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


def load_scene(model: Path, tiles: list[Tile], textures: dict[str, Path]) -> Any:
    """The model as a `trimesh.Scene`, one geometry per group. A model with more groups than tiles repeats the last.

    Args:
        tiles: one per group; where there are none, the model is grey.
        textures: file name -> file. A texture that is not there counts as its colour of the table, else as grey.
    """
    import trimesh
    from trimesh.resolvers import ZipResolver

    text, parts = with_materials(model.read_text(encoding="latin-1"))
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
            colour = np.array(_rgb(code) if code else plain) * tile.colour
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
    if missing := table()["objects"].keys() - models.keys():
        raise ValueError(f"{package}: expected {len(table()['objects'])} models, but {min(missing)} is missing")
    scripts = {str(path): path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.lua"))}
    tiles = read_tiles(scripts)
    for model, entry in table()["objects"].items():
        entry = {"name": entry} if isinstance(entry, str) else entry
        looks = tiles.get(model, [])
        if "tiles" in entry:
            looks = [read_tile(f'"{tile}"', {}) for tile in entry["tiles"]]
        object_id = "homedecor-" + re.sub(r"[^a-z0-9]+", "-", model.removeprefix("homedecor_").removesuffix(".obj"))
        points = sample_surface(load_scene(models[model], looks, textures), POINTS, seed_of(object_id))
        if entry.get("z_up"):
            points[:, :3] @= Z_UP.T
        cloud = normalise(points)
        authors = [author for start, author in OTHER_AUTHORS.items() if model.startswith(start)]
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
