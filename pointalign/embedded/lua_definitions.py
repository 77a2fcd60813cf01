"""Reads from Lua files of Minetest mods what objects look like: their textures, and their boxes without a model.

A definition is a table such as

    register("desk", {
        mesh = "homedecor_desk.obj",
        tiles = { homedecor.plain_wood, "homedecor_desk_drawers.png", { name = "metal.png", color = 0xff303030 } },
    })

where the n-th tile belongs to the n-th group of the model. Without a model, `node_box` lists boxes, and the six tiles
are those of their top, bottom, right, left, back and front. Only what a few regular expressions find is read: values
that are computed, such as names put together in a loop, are not.
"""

import re
from dataclasses import dataclass

COMMENT = re.compile(r"--\[\[.*?\]\]|--[^\n]*", re.DOTALL)
VALUE = r'("[^"\n]+\.png[^"\n]*"|\{[^{}\n]*\.png[^{}\n]*\}|0x[0-9a-fA-F]{8})'
VARIABLE = re.compile(r"(?:\blocal[ \t]+(\w+)|\b(\w+\.[\w.]+))[ \t]*=[ \t]*" + VALUE)
MESH = re.compile(r"""\bmesh\s*=\s*["']([\w.-]+\.obj)["']\s*(?=[,}])""")
REGISTERED = re.compile(r"""\bregister\w*\(\s*["']:?(?:\w+:)?(\w+)["'][^,{}()]*,\s*\{""")
NUMBER = r"-?[\d.]+(?:/\d+)?"
BOX = re.compile(rf"\{{\s*({NUMBER}(?:\s*,\s*{NUMBER}){{5}})\s*,?\s*\}}")
ITEM = re.compile(r"\s*(\{(?:[^{}]|\{[^{}]*\})*\}|[^,{}]+)\s*(?:,|$)")
TEXTURE = re.compile(r"""["']\(?([\w.-]+\.png)[^"']*["']""")  # of layers, the lowest
COLOUR = re.compile(r"(?:\bcolor\s*=\s*)?0x[0-9a-fA-F]{2}([0-9a-fA-F]{6})\b|\.png#([0-9a-fA-F]{6})")
FRAMES = re.compile(r"aspect_w\s*=\s*(\d+).*?aspect_h\s*=\s*(\d+)", re.DOTALL)
FULL_BOX = (-0.5, -0.5, -0.5, 0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Tile:
    """The look of a model's group: a texture, "" for none, times a colour. `frame` is (width, height) of an animation's
    frames, which lie one above the other in the texture.
    """

    texture: str
    colour: tuple[float, ...] = (1.0, 1.0, 1.0)
    frame: tuple[int, int] | None = None


@dataclass(frozen=True)
class Look:
    """The tiles of an object and, for one without a model, its boxes: (x0, y0, z0, x1, y1, z1) each, left-handed."""

    tiles: tuple[Tile, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = (FULL_BOX,)


def read_colour(code: str) -> tuple[float, ...]:
    """The colour of "rrggbb" or "#rrggbb", in 0..1."""
    return tuple(int(code.lstrip("#")[i : i + 2], 16) / 255 for i in (0, 2, 4))


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
        texture[1] if texture and ".." not in expression else "",
        read_colour(colour[1] or colour[2]) if colour else (1.0, 1.0, 1.0),
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


def _field(text: str, name: str) -> str | None:
    """What stands between the braces of `name = { ... }` in the text, or None if there is no such field."""
    field = re.search(rf"\b{name}\s*=\s*\{{", text)
    return text[field.end() : _end_of_table(text, field.end() - 1) - 1] if field else None


def _number(text: str) -> float:
    """A number as the files write it: "-0.5" or "-8/16"."""
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def read_look(definition: str, variables: dict[str, str]) -> Look:
    """The look that a table of the form `tiles = { ... }, node_box = { ... }` gives an object."""
    tiles = [
        read_tile(item[1], variables) for item in ITEM.finditer(_field(definition, "tiles") or "") if item[1].strip()
    ]
    boxes = BOX.findall(_field(definition, "node_box") or "")
    corners = [tuple(_number(number) for number in box.split(",")) for box in boxes]
    return Look(tuple(tiles), tuple(corners) or (FULL_BOX,))


def read_looks(texts: dict[str, str]) -> dict[str, Look]:
    """Model file or registered name -> its look, from Lua files; the first definition that names a texture counts.

    A name that is put together, as in `register("table"..suffix, { ... })`, counts as its first part.

    Args:
        texts: file name -> text.
    """
    texts = {file: COMMENT.sub("", text) for file, text in texts.items()}
    variables = read_variables(texts)
    looks: dict[str, Look] = {}
    for file, text in texts.items():
        starts = [(mesh[1], _start_of_table(text, mesh.start())) for mesh in MESH.finditer(text)]
        starts += [(name[1], name.end() - 1) for name in REGISTERED.finditer(text)]
        for name, start in starts:
            look = read_look(text[start : _end_of_table(text, start)], variables[file])
            if name not in looks or not any(tile.texture for tile in looks[name].tiles):
                looks[name] = look
    return looks
