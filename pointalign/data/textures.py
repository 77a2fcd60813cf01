"""Files beside a mesh: materials and textures under the names that exporters write."""

from pathlib import Path
from urllib.parse import unquote

import numpy as np
from trimesh.resolvers import FilePathResolver

# options of a map statement of an MTL file and the most values each takes
_OPTIONS = {
    "-blendu": 1, "-blendv": 1, "-boost": 1, "-bm": 1, "-cc": 1, "-clamp": 1, "-imfchan": 1, "-mm": 2, "-o": 3, "-s": 3,
    "-t": 3, "-texres": 1, "-type": 1,
}  # fmt: skip


class BesideFiles(FilePathResolver):
    """Finds what a mesh file refers to, in its folder and below, and notes what is missing.

    Accepted besides exact names: percent-encoded URIs, backslashes, other upper and lower case, options before the file
    of an OBJ map, and a path of another machine, of which the file's name counts.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.missing: list[str] = []

    def find(self, name: str) -> Path | None:
        """The file that `name` means, None if there is none; never one outside the mesh's folder."""
        written = map_options(name)[0].strip().strip('"')
        plain = unquote(written).replace("\\", "/")
        for candidate in (written, plain, plain.rsplit("/", 1)[-1]):
            try:
                path = self.absolute(candidate)
            except ValueError:  # outside the folder, or no path at all
                continue
            if path.is_file():
                return path
            if candidate and path.parent.is_dir():
                same = [other for other in path.parent.iterdir() if other.name.lower() == path.name.lower()]
                if len(same) == 1 and same[0].is_file():
                    return same[0]
        return None

    def get(self, name: str) -> bytes:
        path = self.find(name)
        if path is None:
            self.missing.append(map_options(name)[0])
            raise FileNotFoundError(f"no file {name!r} beside the mesh")
        return path.read_bytes()


def map_options(statement: str) -> tuple[str, dict[str, list[str]]]:
    """The file's name and the options of an MTL map statement such as `-s 2 2 1 wood.png`."""
    words = statement.split()
    options: dict[str, list[str]] = {}
    while len(words) > 1 and words[0].lower() in _OPTIONS:
        name = words.pop(0).lower()
        values: list[str] = []
        while len(words) > 1 and len(values) < _OPTIONS[name] and (not values or _is_number(words[0])):
            values.append(words.pop(0))
        options[name] = values
    return (" ".join(words) if options else statement), options


def map_transform(statement: str) -> np.ndarray:
    """[2, 3]: what the options -s and -o of an MTL map do to texture coordinates (u, v, 1)."""
    _, options = map_options(statement)
    scale = [float(value) for value in options.get("-s", []) if _is_number(value)][:2]
    offset = [float(value) for value in options.get("-o", []) if _is_number(value)][:2]
    u, v = [*scale, 1.0, 1.0][:2] if len(scale) != 1 else (scale[0], 1.0)
    du, dv = [*offset, 0.0, 0.0][:2]
    return np.array([[u, 0, du], [0, v, dv]])


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
