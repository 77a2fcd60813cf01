"""Small files that would take much memory or time: textures, scenes, archives and pickles made to hurt."""

import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"


def png(width: int, height: int) -> bytes:
    """A black image of one bit a pixel, which deflate packs a thousandfold."""
    pack, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    data = b"".join([*(pack.compress(row) for _ in range(height)), pack.flush()])

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def glb(change=lambda tree: None, image: bytes = b"", vertices: int = 3) -> bytes:
    """A .glb of a textured triangle (of `vertices` stored ones) whose JSON tree `change` edits."""
    rng = np.random.default_rng(0)
    parts = [
        np.vstack([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], rng.random((vertices - 3, 3))]).astype("<f4").tobytes(),
        np.arange(vertices, dtype="<u4").tobytes(),
        rng.random((vertices, 2)).astype("<f4").tobytes(),
        image,
    ]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    primitive = {"attributes": {"POSITION": 0, "TEXCOORD_0": 2}, "indices": 1, "material": 0}
    kinds = ((5126, "VEC3"), (5125, "SCALAR"), (5126, "VEC2"))
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": [
            {"bufferView": i, "componentType": kind, "count": vertices, "type": width}
            for i, (kind, width) in enumerate(kinds)
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": start, "byteLength": len(part)}
            for start, part in zip(starts, parts, strict=False)
        ],
        "images": [{"bufferView": 3, "mimeType": "image/png"}],
        "textures": [{"source": 0}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "buffers": [{"byteLength": starts[-1]}],
    }
    change(tree)
    head, content = json.dumps(tree).encode(), b"".join(parts)
    head, content = head + b" " * (-len(head) % 4), content + bytes(-len(content) % 4)
    total = 28 + len(head) + len(content)
    return (
        struct.pack("<4sIIII", b"glTF", 2, total, len(head), 0x4E4F534A)
        + head
        + struct.pack("<II", len(content), 0x004E4942)
        + content
    )


def chain(length: int):
    """Nodes below one another, each with the mesh."""

    def change(tree: dict) -> None:
        tree["nodes"] = [{"mesh": 0, "translation": [0, 0, 0.001], "children": [i + 1]} for i in range(length - 1)] + [
            {"mesh": 0}
        ]

    return change


def instances(count: int):
    def change(tree: dict) -> None:
        tree["nodes"] = [{"mesh": 0}] * count
        tree["scenes"] = [{"nodes": list(range(count))}]

    return change


def shared(count: int):
    """Primitives that all refer to the same vertices."""

    def change(tree: dict) -> None:
        tree["meshes"][0]["primitives"] *= count

    return change


def compressed_pcd(points: int) -> bytes:
    """Zeros, which LZF packs to 1/88 of their size."""
    size, packed = points * 12, bytearray(b"\x00\x00")
    done = 1
    while done < size:
        length = min(264, size - done)
        packed += bytes([0xE0, length - 9, 0]) if length >= 9 else bytes([length - 1, *bytes(length)])
        done += length
    head = (
        "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
        f"WIDTH {points}\nHEIGHT 1\nPOINTS {points}\nDATA binary_compressed\n"
    )
    return head.encode() + struct.pack("<II", len(packed), size) + bytes(packed)


def write_all(folder: Path) -> list[Path]:
    """One file of every kind; files that others refer to are written beside them."""
    bomb = png(13304, 13304)
    (folder / "bomb.png").write_bytes(bomb)
    (folder / "bomb.mtl").write_text("newmtl a\nmap_Kd bomb.png\n")
    (folder / "many.mtl").write_text("".join(f"newmtl m{i}\nmap_Kd bomb.png\n" for i in range(200)))
    for name in ("pipe.mtl", "pipe.png"):
        if hasattr(os, "mkfifo"):
            os.mkfifo(folder / name)
    textured = "vt 0 0\nvt 1 0\nvt 0 1\nusemtl {}\nf 1/1 2/2 3/3\n"
    array = np.zeros((1 << 16, 3), np.float32)
    contents = {
        "texture.glb": glb(image=bomb),
        "texture.obj": f"mtllib bomb.mtl\n{TRIANGLE}{textured.format('a')}".encode(),
        "textures.obj": (
            "mtllib many.mtl\n" + TRIANGLE + "".join(textured.format(f"m{i}") for i in range(200))
        ).encode(),
        "pipe.obj": f"mtllib pipe.mtl\n{TRIANGLE}f 1 2 3\n".encode(),
        "pipe.glb": glb(lambda tree: tree["images"].__setitem__(0, {"uri": "pipe.png"})),
        "objects.obj": (TRIANGLE + "".join(f"o a{i}\nusemtl m{i}\nf 1 2 3\n" for i in range(5000))).encode(),
        "chain.glb": glb(chain(1000), png(4, 4)),
        "instances.glb": glb(instances(30_000), png(4, 4), vertices=30_000),
        "nodes.glb": glb(instances(100_001), png(4, 4)),
        "shared.glb": glb(shared(2000), png(4, 4), vertices=30_000),
        "views.glb": glb(lambda tree: tree["bufferViews"].extend(tree["bufferViews"][:1] * 2000), vertices=30_000),
        "zeros.pcd": compressed_pcd(12_000_000),
        "memo.dat": b"\x80\x02]r" + struct.pack("<I", 100_000_000) + b"]\x86.",
        "sets.dat": b"\x80\x04(" + b"\x8f" * 400_000 + b"l.",
        "repeated.dat": pickle.dumps([[array] * 2000, [1] * 2000], protocol=4),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    np.savez_compressed(folder / "zeros.npz", xyz=np.zeros((8_000_000, 3), np.float32))
    return [folder / name for name in (*contents, "zeros.npz")]
