"""Files beside a mesh: materials and textures under the names that exporters write."""

import io
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
from trimesh.resolvers import FilePathResolver

from pointalign.data.point_records import PointCloudError

if TYPE_CHECKING:
    from PIL import Image

PIXELS_PER_BYTE = 32  # that a byte of a texture may stand for, beside
FREE_PIXELS = 1 << 26  # those of any texture: 8192 x 8192
_STRIP = 1 << 22  # pixels converted at once

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
        self._parts = 0
        super().__init__(str(path))
        self.missing: list[str] = []
        self._contents: dict[Path, bytes] = {}
        self._listings: dict[Path, list[Path]] = {}

    @property
    def file_name(self) -> str:
        """What trimesh names the parts of a file by, another name for each.

        Else it would look for a free name among those of all parts, which takes quadratic time.
        """
        self._parts += 1
        return self._file_name if self._parts == 1 else f"{self._file_name}_{self._parts}"

    @file_name.setter
    def file_name(self, name: str) -> None:
        self._file_name = name

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
                if path.parent not in self._listings:
                    self._listings[path.parent] = list(path.parent.iterdir())
                same = [other for other in self._listings[path.parent] if other.name.lower() == path.name.lower()]
                if len(same) == 1 and same[0].is_file():
                    return same[0]
        return None

    def get(self, name: str) -> bytes:
        path = self.find(name)
        if path is None:
            self.missing.append(map_options(name)[0])
            raise FileNotFoundError(f"no file {name!r} beside the mesh")
        return self.read(path)

    def read(self, path: Path) -> bytes:
        """The content of a file that `find` returned; one object, however many materials or buffers name it."""
        if path not in self._contents:
            self._contents[path] = path.read_bytes()
        return self._contents[path]


def texture_content(image: "Image.Image") -> bytes | None:
    """The encoded bytes that an image was opened from; None where they are not known."""
    stream = getattr(image, "fp", None)
    return stream.getvalue() if isinstance(stream, io.BytesIO) else None


def check_pixels(image: "Image.Image", stored: int, share: int = 1) -> None:
    """Refuse an image of `stored` bytes that would take much memory when it is decoded.

    Args:
        share: of the usual number of pixels, 1 / share is accepted.
    """
    width, height = image.size
    if width * height > (PIXELS_PER_BYTE * stored + FREE_PIXELS) // share:
        raise PointCloudError(
            f"a texture of {stored} bytes has {width} x {height} pixels, more than its size accounts for: save it in "
            "a lower resolution"
        )


def read_texels(image: "Image.Image", row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """`[N, 3]` uint8, the RGB values at N pixels.

    The image is decoded apart and not kept, and converted in strips: a file may have hundreds of textures.

    Raises: PointCloudError: it has more pixels than `check_pixels` accepts.
    """
    from PIL import Image

    content = texture_content(image)
    with image.copy() if content is None else Image.open(io.BytesIO(content)) as decoded:
        if content is not None:
            check_pixels(decoded, len(content))
        width, height = decoded.size
        texels = np.empty((len(row), 3), np.uint8)
        rows = max(1, _STRIP // width)
        for top in range(0, height, rows):
            inside = (row >= top) & (row < top + rows)
            if inside.any():
                strip = np.asarray(decoded.crop((0, top, width, min(top + rows, height))).convert("RGB"))
                texels[inside] = strip[row[inside] - top, column[inside]]
    return texels


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
