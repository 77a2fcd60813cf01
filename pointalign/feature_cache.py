"""Frozen point features, computed once (`pointalign features`) and read in the place of clouds. The folder holds

    index.json             fingerprint of weights and preprocessing, shapes, objects per shard
    objects.json           object ids; place i is row i % shard_size of shard i // shard_size
    queries-00000.npy ...  `[shard_size, Q, Dq]` float16, Q-Former outputs, 49 KB an object at the paper's sizes
    queries-00000.crc ...  a CRC-32 for every row of a shard, uint32, checked whenever the row is read
    encoder-00000.npy ...  `[shard_size, T', D]` float16, encoder tokens; only under `--alignment.target encoder`

A shard is renamed into place when complete, so an interrupted run goes on where it stopped; under torchrun each process
takes every world-th shard. Reading maps the files into memory.
"""

import hashlib
import json
import math
import tokenize
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pointalign import storage
from pointalign.data.collator import view_name
from pointalign.data.dataset import ConversationDataset, find_cloud
from pointalign.data.point_cloud import augment, load_point_cloud
from pointalign.efficient import frozen_parts
from pointalign.models import PointAlignFeatureExtractor, PointAlignForConditionalGeneration, PointAlignProcessor

if TYPE_CHECKING:
    from pointalign.options import Options

FORMAT = 1
SHARD_SIZE = 4096
# What numpy raises for a garbled file: its header is a Python literal.
DAMAGED_ARRAYS = (
    ValueError, EOFError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError, tokenize.TokenError,
)  # fmt: skip


class StaleCacheError(ValueError):
    """A cache made with other weights, preprocessing or objects than those in use."""


def fingerprint(model: PointAlignForConditionalGeneration, extractor: PointAlignFeatureExtractor) -> str:
    """SHA-256 of the frozen point branch's weights and of the preprocessing."""
    names = ("num_points", "min_points", "up_axis", "num_channels", "reading")
    preprocessing = {name: getattr(extractor, name) for name in names}
    point = model.config.point_config
    sizes = {"num_groups": point.num_groups, "group_size": point.group_size, "format": FORMAT}
    if model.model.query_experts is not None:  # the routing is not part of the weights
        sizes["routing"] = [model.config.query_routing, model.config.query_top_k]
    digest = hashlib.sha256(json.dumps([preprocessing, sizes], sort_keys=True).encode())
    branch = model.model
    state = {"query_tokens": branch.query_tokens} if branch.query_experts is None else {}
    for part in frozen_parts(branch):
        state |= {f"{part}.{name}": tensor for name, tensor in getattr(branch, part).state_dict().items()}
    for name, tensor in sorted(state.items()):
        values = tensor.detach().to("cpu")
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name}{list(values.shape)}".encode() + values.contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


class FeatureCache:
    """Features by object id.

    Args:
        folder: as `write` left it.
        fingerprint: of the model and preprocessing in use, see `fingerprint`.
        encoder: also give the encoder's tokens.

    Raises:
        FileNotFoundError: there is no cache.
        StaleCacheError: it was made with other weights or preprocessing.
        ValueError: it is not complete, or damaged.
    """

    def __init__(self, folder: str | Path, fingerprint: str, encoder: bool = False):
        self.folder = Path(folder)
        if not (self.folder / "index.json").exists():
            raise FileNotFoundError(
                f"no feature cache in {self.folder}: write it with pointalign features, same options"
            )
        self.index = storage.read_json(self.folder / "index.json")
        if self.index.get("format") != FORMAT or self.index.get("fingerprint") != fingerprint:
            raise StaleCacheError(
                f"{self.folder} was written with other weights or preprocessing "
                f"({str(self.index.get('fingerprint'))[:12]}, now {fingerprint[:12]}): write another one with "
                f"pointalign features"
            )
        objects = self._read_objects()
        self.names = ["queries", *(["encoder"] if encoder else [])]
        missing = [
            name for name in self.names for shard in range(self.shards) if not _complete(self.folder, name, shard)
        ]
        if missing:
            raise ValueError(
                f"{self.folder} is not complete: {len(missing)} of {self.shards * len(self.names)} shards are missing "
                f"({', '.join(sorted(set(missing)))}); run pointalign features again, it goes on"
            )
        self.places = {object_id: place for place, object_id in enumerate(objects)}
        self._open: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}  # rows and their checksums

    def _read_objects(self) -> list[str]:
        objects = storage.read_json(self.folder / "objects.json", list)
        size = self.index.get("shard_size")
        if not (isinstance(size, int) and size > 0 and self.index.get("objects") == len(objects)):
            raise ValueError(
                f"{self.folder / 'index.json'}: expected a shard_size and objects={len(objects)}, as objects.json has"
            )
        if not all(isinstance(name, str) for name in objects) or self.index.get("objects_sha256") != _hash(objects):
            raise ValueError(
                f"{self.folder / 'objects.json'} is not the list that the features were written for (objects_sha256 in "
                f"index.json): write another cache with pointalign features"
            )
        return objects

    @property
    def shards(self) -> int:
        return math.ceil(self.index["objects"] / self.index["shard_size"])

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a pickled memory map would be a copy of the file

    def require(self, object_ids: Iterable[str]) -> None:
        """Raises: ValueError: the cache lacks some of `object_ids`; names the first and counts them."""
        absent = sorted({object_id for object_id in object_ids if object_id not in self.places})
        if absent:
            raise ValueError(
                f"{self.folder} lacks {len(absent)} objects, the first is {absent[0]!r}: write a new cache"
            )

    def get(self, name: str, object_id: str) -> np.ndarray:
        """One object's float16 features, memory-mapped; `name` is `queries` or `encoder`.

        Raises: ValueError: the shard's file is damaged.
        """
        shard, row = divmod(self.places[object_id], self.index["shard_size"])
        if (name, shard) not in self._open:
            self._open[name, shard] = self._open_shard(name, shard)
        rows, checksums = self._open[name, shard]
        if zlib.crc32(np.ascontiguousarray(rows[row])) != checksums[row]:
            raise ValueError(
                f"{_shard(self.folder, name, shard)} is damaged at object {object_id!r}: remove the file and run "
                f"pointalign features again, it computes this shard alone"
            )
        return rows[row]

    def _open_shard(self, name: str, shard: int) -> tuple[np.ndarray, np.ndarray]:
        path = _shard(self.folder, name, shard)
        expected = min(self.index["shard_size"], len(self) - shard * self.index["shard_size"])
        try:
            rows = np.lib.format.open_memmap(path, mode="r")
            checksums = np.fromfile(_checksums(self.folder, name, shard), dtype="<u4")
        except DAMAGED_ARRAYS as error:
            raise ValueError(f"{path}: expected a file of numpy.save: {error}") from error
        if rows.dtype != np.float16 or rows.ndim != 3 or not len(rows) == len(checksums) == expected:
            raise ValueError(
                f"{path}: expected float16 features of {expected} objects and as many checksums, got {rows.dtype} "
                f"{list(rows.shape)} and {len(checksums)}"
            )
        return rows, checksums

    def batch(self, object_ids: Sequence[str]) -> dict[str, Tensor]:
        """Model inputs that stand for the clouds: `query_features [C, Q, Dq]`, and `encoder_tokens` where stored."""
        if not object_ids:
            return {}
        inputs = {"queries": "query_features", "encoder": "encoder_tokens"}
        return {
            inputs[name]: torch.from_numpy(np.stack([self.get(name, object_id) for object_id in object_ids]))
            for name in self.names
        }


def open_cache(
    model: PointAlignForConditionalGeneration, extractor: PointAlignFeatureExtractor, options: "Options"
) -> FeatureCache | None:
    """The feature cache of `--data.feature_cache`, checked against the model and the preprocessing in use.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: it is stale or not complete.
    """
    if options.data.feature_cache is None:
        return None
    encoder = options.alignment.target == "encoder"
    return FeatureCache(options.data.feature_cache, fingerprint(model, extractor), encoder)


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    objects: Sequence[str],
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]],
    fingerprint: str,
    names: Sequence[str] = ("queries",),
    shard_size: int = SHARD_SIZE,
    batch_size: int = 16,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], Any] = lambda objects: None,
) -> int:
    """Compute the shards that are missing. Returns how many objects were computed by this process.

    Args:
        encode: object ids to `{name: [C, ...]}` for every name in `names`.
        progress: called with the number of objects done, each time.

    Raises:
        StaleCacheError: the folder holds a cache of other weights, preprocessing or objects.
        FloatingPointError: a feature is not finite in float16.
    """
    folder = Path(folder)
    objects = list(objects)
    index = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "objects": len(objects),
        "objects_sha256": _hash(objects),
        "shard_size": shard_size,
    }
    # each process, as the others may be lost: shards without an index could be of any weights
    with storage.lock(folder / ".lock"):
        if (folder / "index.json").exists():
            present = storage.read_json(folder / "index.json")
            changed = [name for name, value in index.items() if present.get(name) != value]
            if changed:
                raise StaleCacheError(
                    f"{folder} holds another cache (its {', '.join(changed)} differ): give an empty folder, or remove "
                    "it"
                )
        else:
            storage.write_json(folder / "objects.json", objects)
            storage.write_json(folder / "index.json", index)
    done = 0
    for shard in range(rank, math.ceil(len(objects) / shard_size), world):
        missing = [name for name in names if not _complete(folder, name, shard)]
        ids = objects[shard * shard_size : (shard + 1) * shard_size]
        if not missing:
            progress(len(ids))
            continue
        rows: dict[str, list[np.ndarray]] = {name: [] for name in missing}
        for first in range(0, len(ids), batch_size):
            batch = ids[first : first + batch_size]
            features = encode(batch)
            for name in missing:
                half = features[name].astype(np.float16)
                if not np.isfinite(half).all():
                    bad = batch[int(np.argwhere(~np.isfinite(half.reshape(len(batch), -1)).all(axis=1))[0, 0])]
                    raise FloatingPointError(f"object {bad!r}: its {name} features are not finite in float16")
                rows[name].append(half)
            progress(len(batch))
        for name in missing:
            values = np.concatenate(rows[name])
            checksums = np.array([zlib.crc32(row) for row in values], dtype="<u4")
            with storage.replacing(_checksums(folder, name, shard)) as temporary:
                checksums.tofile(temporary)
            with storage.replacing(_shard(folder, name, shard)) as temporary, temporary.open("wb") as file:
                np.save(file, values)
        done += len(ids)
    return done


def _shard(folder: Path, name: str, shard: int) -> Path:
    return folder / f"{name}-{shard:05d}.npy"


def _checksums(folder: Path, name: str, shard: int) -> Path:
    return folder / f"{name}-{shard:05d}.crc"


def _complete(folder: Path, name: str, shard: int) -> bool:
    return _shard(folder, name, shard).exists() and _checksums(folder, name, shard).exists()


def _hash(objects: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(objects).encode()).hexdigest()


def encoder_of(
    model: PointAlignForConditionalGeneration,
    extractor: PointAlignFeatureExtractor,
    clouds: Sequence[str | Path],
    device: torch.device,
    encoder: bool,
    views: int = 0,
) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """`encode` for `write`: reads from the folders `clouds` and runs the point branch in float32.

    Args:
        views: names are those of `view_name`: view v of an object is augmented by a generator that its name seeds, and
            keeps the object's pose if v < views / 2.
    """
    model.eval()

    def view_of(name: str) -> np.ndarray:
        object_id, _, number = name.rpartition("#")
        cloud = load_point_cloud(find_cloud(clouds, object_id), extractor.up_axis, **extractor.reading)
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
        # no more points than the model reads: the rest would be augmented in vain
        cloud = cloud[rng.permutation(len(cloud))[: extractor.num_points]]
        return augment(cloud, rng, int(number) >= views // 2, extractor.min_points)

    @torch.inference_mode()
    def encode(names: Sequence[str]) -> dict[str, np.ndarray]:
        read = view_of if views else lambda name: find_cloud(clouds, name)
        batch = extractor([read(name) for name in names]).to(device)
        tokens = model.model.get_encoder_tokens(batch["point_values"], batch["point_lengths"])
        features = {"queries": model.model.query(tokens)} | ({"encoder": tokens} if encoder else {})
        return {name: feature.float().cpu().numpy() for name, feature in features.items()}

    return encode


def entries(datasets: Sequence[ConversationDataset], views: int) -> list[str]:
    """Names of a cache's rows: the objects of the data sets, or `views` views of each."""
    objects = sorted({object_id for part in datasets for ids in part.conversations.object_ids for object_id in ids})
    return [view_name(object_id, view) for object_id in objects for view in range(views)] if views else objects


def write_for(
    options: "Options",
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    datasets: Sequence[ConversationDataset],
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Write the cache that a training with these options reads; goes on where an earlier call was stopped.

    Returns: the number of rows.
    """
    assert options.data.feature_cache is not None and processor.feature_extractor is not None
    parts = [getattr(model.model, part) for part in frozen_parts(model.model)]
    devices = [next(part.parameters()).device for part in parts]
    queries = model.model.query_tokens
    for part in parts:
        part.to(device)
    if queries is not None:
        queries.data = queries.data.to(device)
    encoder, views = options.alignment.target == "encoder", options.data.views
    names = entries(datasets, views)
    with tqdm(total=len(names[rank::world]), desc="encoding clouds", unit="view" if views else "object",
              disable=rank != 0) as bar:  # fmt: skip
        write(
            options.data.feature_cache,
            names,
            encoder_of(model, processor.feature_extractor, datasets[0].clouds, device, encoder, views),
            fingerprint(model, processor.feature_extractor),
            names=["queries", *(["encoder"] if encoder else [])],
            rank=rank,
            world=world,
            progress=bar.update,
        )
    for part, home in zip(parts, devices, strict=True):
        part.to(home)
    return len(names)
