"""What the point ops race against: the wheels a user could install instead, plain PyTorch, and the release's way."""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointalign.models import point_encoder
from pointalign_kernels import farthest_point_sample, group_points, reference

QUICKFPS_HEIGHTS = (3, 5, 7, 9)  # of the tree: 2^h buckets


class Clouds(NamedTuple):
    """Inputs of one call: `points` `[B, N, 3]`, `coloured` `[B, N, 6]`, `index` `[B, G]` of the centres."""

    points: Tensor
    coloured: Tensor
    index: Tensor


def surfaces(batch: int, num_points: int, seed: int = 0) -> Tensor:
    """Ellipsoids and boxes of random proportions, in the unit ball, rows in random order. `[B, N, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    points = functional.normalize(torch.randn(batch, num_points, 3, generator=generator), dim=-1)
    box = points / points.abs().amax(dim=-1, keepdim=True)
    points = torch.where((torch.arange(batch) % 2 == 0)[:, None, None], points, box)
    points = points * (0.2 + torch.rand(batch, 1, 3, generator=generator))
    return points / points.norm(dim=-1).amax(dim=-1)[:, None, None]


def make_clouds(device: torch.device, batch: int, num_points: int, num_samples: int, seed: int, impl: str) -> Clouds:
    points = surfaces(batch, num_points, seed)
    colours = torch.rand(points.shape, generator=torch.Generator().manual_seed(seed))
    coloured = torch.cat([points, colours], dim=-1).to(device)
    points = points.to(device)
    return Clouds(points, coloured, farthest_point_sample(points, num_samples, impl=impl))


# -- sampling ----------------------------------------------------------------------------------------------------------


def is_farthest_throughout(points: Tensor, index: Tensor) -> bool:
    """Whether every sample is a farthest point from those before it, whatever the first one. `[N, 3]`, `[K]`."""
    nearest = torch.full((len(points),), float("inf"))
    for previous, newest in pairwise(index.tolist()):
        nearest = torch.minimum(nearest, reference.squared_distance(points, points[previous]))
        if nearest[newest] < nearest.max() * (1 - 1e-5):
            return False
    return True


def _fpsample(num_points: int, num_samples: int, executor: ThreadPoolExecutor) -> dict[str, Callable]:
    """Every exact mode of fpsample, which takes one cloud at a time: threads share the clouds."""
    import fpsample  # pyright: ignore[reportMissingImports]

    modes: dict[str, Callable] = {
        "fps_sampling": lambda cloud: fpsample.fps_sampling(cloud, num_samples, start_idx=0),
        "kdtree": lambda cloud: fpsample.bucket_fps_kdtree_sampling(cloud, num_samples, start_idx=0),
    }
    for height in QUICKFPS_HEIGHTS:
        if 2**height <= num_points:
            modes[f"kdline h={height}"] = lambda cloud, height=height: fpsample.bucket_fps_kdline_sampling(
                cloud, num_samples, height, start_idx=0
            )
    return {
        f"fpsample {name}": lambda clouds, mode=mode: list(executor.map(mode, clouds.points.numpy()))
        for name, mode in modes.items()
    }


def _torch_quickfps(num_points: int, num_samples: int) -> dict[str, Callable]:
    import torch_quickfps  # pyright: ignore[reportMissingImports]

    return {
        f"torch-quickfps h={height}": lambda clouds, height=height: torch_quickfps.sample_idx(
            clouds.points, num_samples, h=height, start_idx=0
        )
        for height in QUICKFPS_HEIGHTS
        if 2**height <= num_points
    }


def _torch_fps(device: torch.device, batch: int, num_points: int, num_samples: int) -> dict[str, Callable]:
    """Its Triton kernels, without the checks that would synchronise."""
    import torch_fps  # pyright: ignore[reportMissingImports]

    everything = torch.ones(batch, num_points, dtype=torch.bool, device=device)
    options = {"random_start": False, "validate": False, "assume_finite": True}
    return {
        "torch-fps": lambda clouds: torch_fps.farthest_point_sampling(clouds.points, everything, num_samples, **options)
    }


def sampling_peers(clouds: Clouds, num_samples: int, executor: ThreadPoolExecutor) -> dict[str, Callable]:
    """`call(clouds)` of every installed package that samples on the device of `clouds`, for clouds of that shape."""
    batch, num_points, _ = clouds.points.shape
    device = clouds.points.device
    peers: dict[str, Callable] = {}
    if device.type == "cpu" and importlib.util.find_spec("fpsample"):
        peers |= _fpsample(num_points, num_samples, executor)
    if importlib.util.find_spec("torch_quickfps"):
        peers |= _torch_quickfps(num_points, num_samples)
    if device.type == "cuda" and importlib.util.find_spec("torch_fps"):  # on a CPU it compiles C++ at its first call
        peers |= _torch_fps(device, batch, num_points, num_samples)
    return peers


# -- grouping ----------------------------------------------------------------------------------------------------------


def topk_group(points: Tensor, centre_index: Tensor, k: int) -> Tensor:
    """What point encoders usually do: all distances, topk, gather. `[B, N, C]`, `[B, G]` -> `[B, G, k, C]`"""
    batch = torch.arange(len(points), device=points.device)[:, None]
    centres = points[batch, centre_index]
    distance = reference.squared_distance(centres[:, :, None], points[:, None])
    index = distance.topk(k, dim=-1, largest=False).indices
    groups = points[batch[..., None], index]
    return torch.cat([groups[..., :3] - centres[:, :, None, :3], groups[..., 3:]], dim=-1)


def topk_group_one_by_one(points: Tensor, centre_index: Tensor, k: int) -> list[Tensor]:
    """The same, cloud by cloud: on a CPU the distances of a batch would fall out of the cache."""
    return [topk_group(points[b : b + 1], centre_index[b : b + 1], k) for b in range(len(points))]


def kdtree_neighbours(points: Tensor, centre_index: Tensor, k: int) -> list:
    """Indices `[G, k]` per cloud, by scipy."""
    from scipy.spatial import KDTree

    workers = torch.get_num_threads()
    clouds = zip(points[..., :3].numpy(), centre_index.numpy(), strict=True)
    return [KDTree(cloud).query(cloud[index], k, workers=workers)[1] for cloud, index in clouds]


# -- mini-PointNet and the encoder of the release ----------------------------------------------------------------------


def mini_pointnet(channels: int = 6, width: int = 256) -> tuple[nn.Sequential, nn.Sequential]:
    def block(columns: int, hidden: int, out: int) -> nn.Sequential:
        layers = [nn.Conv1d(columns, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, out, 1)]
        return nn.Sequential(*layers).eval()

    torch.manual_seed(0)
    return block(channels, width // 2, width), block(2 * width, 2 * width, width)


def plain_pointnet(first: nn.Sequential, second: nn.Sequential, groups: Tensor) -> Tensor:
    """Convolutions over `[global, local]`, unfolded. `[B, G, k, C]` -> `[B, G, d]`"""
    batch, num_groups, neighbours, _ = groups.shape
    features = first(groups.flatten(0, 1).transpose(1, 2))
    shared = features.amax(dim=2, keepdim=True).expand(-1, -1, neighbours)
    return second(torch.cat([shared, features], dim=1)).amax(dim=2).view(batch, num_groups, -1)


def loop_sample(points: Tensor, num_samples: int) -> Tensor:
    """Farthest points in a Python loop over the samples, as the release samples. `[B, N, 3]` -> `[B, K]`"""
    rows = torch.arange(len(points), device=points.device)
    nearest = torch.full(points.shape[:2], float("inf"), device=points.device)
    index = torch.zeros(len(points), num_samples, dtype=torch.long, device=points.device)
    for step in range(1, num_samples):
        newest = points[rows, index[:, step - 1]][:, None]
        nearest = torch.minimum(nearest, (points - newest).square().sum(dim=-1))
        index[:, step] = nearest.argmax(dim=-1)
    return index


def expanded_group(points: Tensor, centre_index: Tensor, k: int) -> Tensor:
    """Groups by `a^2 - 2ab + b^2` and topk, as the release groups. `[B, N, C]`, `[B, G]` -> `[B, G, k, C]`"""
    batch = torch.arange(len(points), device=points.device)[:, None]
    centres, xyz = points[batch, centre_index], points[..., :3]
    distance = centres[..., :3].square().sum(-1)[..., None] + xyz.square().sum(-1)[:, None]
    distance = distance - 2 * centres[..., :3] @ xyz.transpose(1, 2)
    groups = points[batch[..., None], distance.topk(k, dim=-1, largest=False, sorted=False).indices]
    return torch.cat([groups[..., :3] - centres[:, :, None, :3], groups[..., 3:]], dim=-1)


@contextmanager
def ops_replaced(sample: Callable, group: Callable) -> Iterator[None]:
    """Encoders sample and group by these functions instead of the package's."""
    with patch.multiple(point_encoder, farthest_point_sample=sample, group_points=group):
        yield


class _PlainPointNet(nn.Module):
    """The mini-PointNet of an encoder, unfolded."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.first_conv, self.second_conv = encoder.first_conv, encoder.second_conv

    def forward(self, groups: Tensor) -> Tensor:
        return plain_pointnet(self.first_conv, self.second_conv, groups)


def encoder_contenders(encoder: point_encoder.PointBertModel, native: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """`call(points)` by name: the tokens of a frozen encoder in eval mode, sampled and grouped in several ways.

    Args:
        native: whether the native ops run on the encoder's device.
    """
    release = copy.deepcopy(encoder)
    release.encoder = _PlainPointNet(release.encoder)

    def with_impl(impl: str) -> Callable[[Tensor], Tensor]:
        sample, group = partial(farthest_point_sample, impl=impl), partial(group_points, impl=impl)

        def call(points: Tensor) -> Tensor:
            with ops_replaced(sample, group):
                return encoder(points)

        return call

    def as_the_release(points: Tensor) -> Tensor:
        with ops_replaced(loop_sample, expanded_group):
            return release(points)

    contenders = {"native ops": with_impl("native")} if native else {}
    contenders["reference ops"] = with_impl("reference")
    contenders["the release's way: Python loop, topk of expanded squares, unfolded PointNet"] = as_the_release
    return contenders
