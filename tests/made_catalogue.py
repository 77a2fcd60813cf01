"""A tiny furniture catalogue and Debian package, made on the fly."""

import io
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

SQUARE = """mtllib {name}.mtl
v 0 0 0
v {width} 0 0
v {width} {height} 0
v 0 {height} 0
v 0 0 {depth}
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl paint
f 1/1 2/2 3/3 4/4
f 1/1 2/2 5/3
"""
KATOR = "name=Made catalog\nlicense=Copyright \xa9 made\n"


def make_catalogue(path: Path, objects: list[dict]) -> Path:
    """Write a `.sh3f` file. Each object: id, name and optionally category, creator, rotation, size, image, kd."""
    lines = [KATOR, "# a comment = with an equals sign"]
    with zipfile.ZipFile(path, "w") as files:
        for number, item in enumerate(objects, 1):
            width, height, depth = item.get("size", (60.0, 90.0, 30.0))
            name = item["id"]
            keys = {
                "id": f"Made Up#{name}",
                "name": item["name"],
                "category": item.get("category", "Kitchen"),
                "creator": item.get("creator", "Somebody"),
                "model": f"/made/{name}/{name}.obj",
                "width": width,
                "height": height,
                "depth": depth,
            }
            if "rotation" in item:
                keys["modelRotation"] = item["rotation"]
            lines += [f"{key}#{number}={value}" for key, value in keys.items()]
            files.writestr(f"made/{name}/{name}.obj", SQUARE.format(name=name, width=width, height=height, depth=depth))
            material = f"newmtl paint\nKd {item.get('kd', '1 0 0')}\n"
            if "image" in item:
                data = io.BytesIO()
                item["image"].save(data, "PNG")
                files.writestr(f"made/{name}/paint.png", data.getvalue())
                material += "map_Kd paint.png\n"
            files.writestr(f"made/{name}/{name}.mtl", material)
        files.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin-1"))
    return path


def quarters(*colours: tuple[int, ...]) -> Image.Image:
    """A 64 x 64 RGBA image of four squares: top left, top right, bottom left, bottom right."""
    image = Image.new("RGBA", (64, 64))
    for i, colour in enumerate(colours):
        image.paste(Image.new("RGBA", (32, 32), colour), (32 * (i % 2), 32 * (i // 2)))
    return image


def make_deb(path: Path, files: list[Path], root: str = "") -> Path:
    """Write a Debian package whose data member holds `files`, with their folders if it has a root for them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for file in files:
            name = f"{root}/{file.parent.name}" if root else "./usr/share/sweethome3d/furniture"
            tar.add(file, f"{name}/{file.name}")
    members = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data.getvalue())]
    with path.open("wb") as out:
        out.write(b"!<arch>\n")
        for name, content in members:
            out.write(name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8))
            out.write(str(len(content)).encode().ljust(10) + b"`\n" + content + b"\n" * (len(content) % 2))
    return path
