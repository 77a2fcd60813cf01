"""Every reader of the project with small valid files of it, for tests and searches that change files at random."""

import contextlib
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pointalign import feature_cache, options, run_checkpoints, stage_file, storage, training_command
from pointalign.convert.files import Source
from pointalign.data.conversations import IndexedConversations, load_conversations
from pointalign.data.dataset import load_modelnet40
from pointalign.data.point_cloud import load_point_cloud

CORPUS = Path(__file__).parent / "corpus"  # <reader>/<file>: what once raised an error that is not documented


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Bytes flipped, overwritten, cut out or repeated, at one place or several."""
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 1, 4))):
            if not changed:
                break
            at, length = draw.randrange(len(changed)), draw.choice((1, 1, 2, 8, 64))
            kind = draw.randrange(6)
            if kind == 0:
                changed[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                changed[at : at + length] = draw.randbytes(length)
            elif kind == 2:
                del changed[at : at + length]
            elif kind == 3:
                changed[at:at] = changed[at : at + length]
            elif kind == 4:
                changed[at : at + length] = draw.choice(
                    (b"-1", b"nan", b"9999999999", b"\xff" * 8, b"null", b"[]", b"{}")
                )
            else:
                del changed[at + 1 :]
        yield bytes(changed)


@dataclass
class Reader:
    """A reader and valid files of it.

    Attributes:
        write: into an empty folder; returns the files that may be changed.
        read: of that folder, with one of these files changed.
        names: whether its error names the changed file (or the folder, where several files belong together).
        slow: how many times fewer executions it gets, for readers that start a process or build a large object.
    """

    write: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], object]
    names: bool = True
    slow: int = 1


def executions(
    reader: Reader, place: Path, count: int, seed: int = 0
) -> tuple[int, list[tuple[Path, bytes, Exception]]]:
    """Change files at random and read them.

    Returns: The number of executions, and what raised an error that is no ValueError or does not name its file.
    """
    folder = place / "valid"
    folder.mkdir(parents=True)
    files = reader.write(folder)
    for file in files:
        reader.read(folder, file)
    share, done, wrong = max(1, count // reader.slow // len(files)), 0, []
    for file in files:
        written = file.read_bytes()
        for data in mutations(written, share, seed + len(file.name)):
            done += 1
            file.write_bytes(data)
            if error := undocumented(reader, folder, file):
                wrong.append((file, data, error))
        file.write_bytes(written)
    shutil.rmtree(folder)
    return done, wrong


def undocumented(reader: Reader, folder: Path, file: Path) -> Exception | None:
    """The error of reading a changed file, unless it is the documented one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            reader.read(folder, file)
    except ValueError as error:
        return None if not reader.names or file.name in str(error) or folder.name in str(error) else error
    except FileNotFoundError as error:  # a name in the file that no longer names another one
        return None if file.suffix in (".json", ".yaml") else error
    except Exception as error:
        return error
    return None


# -- clouds and meshes -------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
XYZ, RGB = RNG.random((12, 3)).astype("<f4"), RNG.integers(0, 255, (12, 3)).astype("u1")


def _ply(text: bool) -> bytes:
    kind = "ascii" if text else "binary_little_endian"
    fields = "".join(f"property float {name}\n" for name in "xyz") + "".join(
        f"property uchar {name}\n" for name in ("red", "green", "blue")
    )
    head = f"ply\nformat {kind} 1.0\ncomment a scan\nelement vertex {len(XYZ)}\n{fields}end_header\n".encode()
    rows = zip(XYZ.tolist(), RGB.tolist(), strict=True)
    if text:
        return head + "".join(f"{' '.join(map(str, xyz + rgb))}\n" for xyz, rgb in rows).encode()
    return head + b"".join(np.array(xyz, "<f4").tobytes() + bytes(rgb) for xyz, rgb in rows)


def _pcd(kind: str) -> bytes:
    head = f"VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {len(XYZ)}\nHEIGHT 1\n"
    head = f"{head}POINTS {len(XYZ)}\nDATA {kind}\n".encode()
    if kind == "ascii":
        return head + "".join(f"{x} {y} {z}\n" for x, y, z in XYZ.tolist()).encode()
    if kind == "binary":
        return head + XYZ.tobytes()
    columns = XYZ.T.tobytes()
    packed = b"".join(bytes([len(columns[at : at + 32]) - 1]) + columns[at : at + 32] for at in range(0, 144, 32))
    sizes = len(packed).to_bytes(4, "little") + len(columns).to_bytes(4, "little")
    return head + sizes + packed


def _las(suffix: str) -> bytes:
    import laspy

    las = laspy.create(point_format=7, file_version="1.4")
    las.x, las.y, las.z = XYZ.astype(np.float64).T
    las.red, las.green, las.blue = (RGB.astype("u2") * 257).T
    content = io.BytesIO()
    las.write(content, do_compress=suffix == ".laz")
    return content.getvalue()


def _clouds(folder: Path) -> list[Path]:
    np.save(folder / "a.npy", np.hstack([XYZ, RGB / np.float32(255)]))
    np.save(folder / "b.npy", np.array({"xyz": XYZ, "rgb": RGB, "id": "a"}, object))  # type: ignore[arg-type]
    np.savez_compressed(folder / "a.npz", xyz=XYZ, rgb=RGB)
    contents = {"a.ply": _ply(True), "b.ply": _ply(False), "a.las": _las(".las")}
    contents |= {f"{kind}.pcd": _pcd(kind) for kind in ("ascii", "binary", "binary_compressed")}
    rows = [" ".join(map(str, xyz + rgb)) for xyz, rgb in zip(XYZ.tolist(), RGB.tolist(), strict=True)]
    text = "\n".join(rows)
    contents["a.xyz"], contents["a.txt"] = f"# a scan\n{text}\n".encode(), f"// a scan\n{text}\n".encode()
    contents["a.pts"] = f"{len(rows)}\n{text}\n".encode()
    contents["a.csv"] = ("x,y,z,r,g,b\n" + text.replace(" ", ",")).encode()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def _laz(folder: Path) -> list[Path]:
    (folder / "a.laz").write_bytes(_las(".laz"))
    return [folder / "a.laz"]


def _meshes(folder: Path) -> list[Path]:
    import trimesh
    from PIL import Image
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial, SimpleMaterial

    box = trimesh.creation.box()
    uv = RNG.random((len(box.vertices), 2))
    image = Image.fromarray(RNG.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    for suffix, material in (
        ("glb", PBRMaterial(baseColorTexture=image)), ("gltf", PBRMaterial(baseColorTexture=image)),
        ("obj", SimpleMaterial(image=image)), ("ply", None), ("stl", None), ("off", None),
    ):  # fmt: skip
        mesh = box.copy()
        if material is not None:
            mesh.visual = TextureVisuals(uv=uv, material=material)
        mesh.export(folder / f"box.{suffix}")
    return sorted(folder.iterdir())


def _read_mesh(folder: Path, file: Path) -> object:
    """Files beside a mesh are read with it."""
    name = {".mtl": "box.obj", ".png": "box.obj", ".bin": "box.gltf"}.get(file.suffix, file.name)
    try:
        return load_point_cloud(folder / name, num_points=32)
    except ValueError as error:
        assert str(folder) in str(error)
        raise ValueError(file.name) from error


def _modelnet(folder: Path) -> list[Path]:
    for protocol in (2, 4, 5):
        content = pickle.dumps([[XYZ, XYZ + 1], [np.array([3]), 4]], protocol=protocol)
        (folder / f"{protocol}.dat").write_bytes(content)
    return sorted(folder.iterdir())


# -- annotations, recipes, weights -------------------------------------------------------------------------------------


def _annotations(folder: Path) -> list[Path]:
    turns = [{"from": "human", "value": "<point>\nWhat is it?"}, {"from": "gpt", "value": "A mug, grün."}]
    entries = [{"object_id": name, "conversation_type": "simple_description", "conversations": turns} for name in "abc"]
    (folder / "a.json").write_text(json.dumps(entries))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return sorted(folder.iterdir())


def _recipe(folder: Path) -> list[Path]:
    shutil.copy(options.RECIPES / "align.yaml", folder / "recipe.yaml")
    return [folder / "recipe.yaml"]


def _parse_recipe(folder: Path, file: Path) -> None:
    try:
        options.parse([str(file), "--training.use_cpu", "true"])
    except SystemExit as stop:
        assert stop.code == 2
        raise ValueError(file.name) from stop


def _stage(folder: Path) -> list[Path]:
    settings = {"adapters": {"language_model": {"lora_alpha": 8}}, "query_routing": "sparse", "query_top_k": 2}
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    save_file(tensors, folder / "stage.safetensors", metadata={"model": json.dumps(settings)})
    return [folder / "stage.safetensors"]


def _read_stage(folder: Path, file: Path) -> None:
    stage_file.adapted_parts(file)
    storage.load_tensors(file)


def _published(folder: Path) -> list[Path]:
    content = {"model": {"query_tokens": torch.zeros(2, 3), "step": 5}}
    torch.save(content, folder / "zip.pth")
    torch.save(content, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({"query_tokens": torch.zeros(2, 3)}, folder / "a.safetensors")
    return sorted(folder.iterdir())


def _read_published(folder: Path, file: Path) -> None:
    from pointalign.convert.files import _unpickled

    _unpickled.cache_clear()  # read files are remembered by name
    source = Source("checkpoint", file)
    for name in source.shapes:
        source.read(name)


# -- folders -----------------------------------------------------------------------------------------------------------

CACHED = [f"o{place}" for place in range(6)]


def _cache(folder: Path) -> list[Path]:
    def encode(ids: list[str]) -> dict[str, np.ndarray]:
        return {"queries": np.random.default_rng(0).random((len(ids), 4, 16), dtype=np.float32)}

    feature_cache.write(folder, CACHED, encode, "fp", shard_size=4)  # type: ignore[arg-type]
    return sorted(folder.iterdir())


def _optimizer() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


def _checkpoint(folder: Path) -> list[Path]:
    new = folder.parent / "new"
    run_checkpoints.save_optimizer(new, *_optimizer())
    run_checkpoints.save_random(new / "random_0")
    run_checkpoints.publish(new, folder, {"model": {"lora_alpha": 1}})
    return sorted(folder.iterdir())


def _read_checkpoint(folder: Path, file: Path) -> None:
    """Each part alone too: a run verifies first, and reads only what has passed."""
    errors = []
    for read in (
        lambda: run_checkpoints.verify(folder),
        lambda: run_checkpoints.load_optimizer(folder, *_optimizer()),
        lambda: run_checkpoints.load_random(folder / "random_0"),
    ):
        try:
            read()
        except run_checkpoints.CheckpointError as error:
            errors.append(error)
    if errors:
        raise errors[0]


READERS = {
    "point clouds": Reader(_clouds, lambda _, file: load_point_cloud(file)),
    "LAZ clouds": Reader(_laz, lambda _, file: load_point_cloud(file), slow=50),
    "meshes": Reader(_meshes, _read_mesh),
    "ModelNet pickles": Reader(_modelnet, lambda _, file: load_modelnet40(file)),
    "annotations": Reader(_annotations, lambda _, file: load_conversations(file)),
    "annotations, indexed": Reader(_annotations, lambda _, file: IndexedConversations(file)[0]),
    "recipes": Reader(_recipe, lambda _, file: training_command.check_recipe(file)),
    "recipes and options": Reader(_recipe, _parse_recipe, slow=20),
    "stage files": Reader(_stage, _read_stage),
    "published weights": Reader(_published, _read_published),
    "feature caches": Reader(_cache, lambda folder, _: feature_cache.FeatureCache(folder, "fp").batch(CACHED)),
    "checkpoints": Reader(_checkpoint, _read_checkpoint),
}
