"""The feature cache: resumable, shared among processes, refused when stale, and small in memory at any size."""

import hashlib
import json
import pickle
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch

from pointalign import feature_cache
from pointalign.data.collator import view_name
from pointalign.data.point_cloud import augment
from pointalign.efficient.memory import peak_resident_bytes
from pointalign.feature_cache import FeatureCache, StaleCacheError, write

OBJECTS = [f"object{i}" for i in range(23)]


def encode(object_ids):
    """Features that tell whose they are."""
    numbers = np.array([int(one.removeprefix("object")) for one in object_ids], dtype=np.float32)
    return {
        "queries": np.broadcast_to(numbers[:, None, None], (len(numbers), 4, 6)),
        "encoder": np.broadcast_to(-numbers[:, None, None], (len(numbers), 9, 5)),
    }


def test_two_processes_write_what_one_reads(tmp_path):
    for rank in range(2):
        write(tmp_path, OBJECTS, encode, "a", ["queries", "encoder"], shard_size=5, batch_size=3, rank=rank, world=2)
    cache = FeatureCache(tmp_path, "a", encoder=True)
    batch = cache.batch(["object22", "object0", "object22"])
    assert batch["query_features"][:, 0, 0].tolist() == [22, 0, 22]
    assert batch["encoder_tokens"].shape == (3, 9, 5) and batch["encoder_tokens"][0, 0, 0] == -22
    assert cache.batch([]) == {}
    with pytest.raises(ValueError, match=r"lacks 1 objects, the first is 'nobody'"):
        cache.require(["object1", "nobody"])
    again = pickle.loads(pickle.dumps(cache))
    assert again.get("queries", "object7")[0, 0] == 7


def test_an_interrupted_run_goes_on(tmp_path):
    calls = []

    def failing(object_ids):
        calls.extend(object_ids)
        if "object12" in object_ids:
            raise KeyboardInterrupt
        return encode(object_ids)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, OBJECTS, failing, "a", shard_size=5, batch_size=5)
    with pytest.raises(ValueError, match="3 of 5 shards are missing"):
        FeatureCache(tmp_path, "a")
    assert not list(tmp_path.glob(".*incomplete"))
    assert write(tmp_path, OBJECTS, encode, "a", shard_size=5) == 13
    assert FeatureCache(tmp_path, "a").get("queries", "object12")[0, 0] == 12
    assert write(tmp_path, OBJECTS, encode, "a", shard_size=5) == 0


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_another_number_of_processes_goes_on_where_one_of_several_was_lost(lost, tmp_path):
    def dies(ids):
        if OBJECTS[5 * lost] in ids:
            raise MemoryError
        return encode(ids)

    names = ["queries", "encoder"]
    for rank in range(3):
        with suppress(MemoryError):
            write(tmp_path / "a", OBJECTS, dies, "a", names, shard_size=5, batch_size=3, rank=rank, world=3)
    with pytest.raises(ValueError, match="is not complete"):
        FeatureCache(tmp_path / "a", "a")
    with pytest.raises(StaleCacheError):  # whichever process is left, its shards are known to be of these weights
        write(tmp_path / "a", OBJECTS, encode, "b", names, shard_size=5)
    done = [write(tmp_path / "a", OBJECTS, encode, "a", names, shard_size=5, rank=rank, world=2) for rank in range(2)]
    assert 0 < sum(done) < len(OBJECTS)
    write(tmp_path / "b", OBJECTS, encode, "a", names, shard_size=5)
    for path in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


def test_a_process_that_is_left_alone_says_what_its_shards_are_of(tmp_path):
    write(tmp_path, OBJECTS, encode, "a", shard_size=5, rank=1, world=2)  # the first process died before it began
    with pytest.raises(StaleCacheError):
        write(tmp_path, OBJECTS, encode, "b", shard_size=5)


def test_stale_caches_are_refused(tmp_path):
    write(tmp_path, OBJECTS, encode, "a", shard_size=5)
    with pytest.raises(StaleCacheError, match="other weights or preprocessing"):
        FeatureCache(tmp_path, "b")
    with pytest.raises(StaleCacheError, match="fingerprint differ"):
        write(tmp_path, OBJECTS, encode, "b", shard_size=5)
    with pytest.raises(StaleCacheError, match="objects"):
        write(tmp_path, OBJECTS[:-1], encode, "a", shard_size=5)
    with pytest.raises(ValueError, match="shards are missing"):
        FeatureCache(tmp_path, "a", encoder=True)
    with pytest.raises(FileNotFoundError, match="no feature cache"):
        FeatureCache(tmp_path / "elsewhere", "a")


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("objects.json", lambda text: json.dumps(json.loads(text)[::-1]), "not the list that the features"),
        ("objects.json", lambda text: "{}", r"expected a JSON list"),
        ("objects.json", lambda text: json.dumps([*json.loads(text)[:-1], 5]), "not the list"),
        ("index.json", lambda text: "{}", "other weights or preprocessing"),
        ("index.json", lambda text: "[" * 100_000, "nested too deep"),
        ("index.json", lambda text: text.replace('"shard_size": 5', '"shard_size": 0'), "expected a shard_size"),
        ("index.json", lambda text: text.replace('"objects": 23', '"objects": "23"'), "objects=23"),
        ("index.json", lambda text: text.replace('"objects": 23', f'"objects": {10**18}'), "objects=23"),
    ],
)
def test_a_damaged_index_is_named(name, spoil, message, tmp_path):
    write(tmp_path, OBJECTS, encode, "a", shard_size=5)
    FeatureCache(tmp_path, "a")
    (tmp_path / name).write_text(spoil((tmp_path / name).read_text()))
    with pytest.raises(ValueError, match=message):
        FeatureCache(tmp_path, "a")


@pytest.mark.parametrize("name", ["queries-00001.npy", "queries-00001.crc"])
@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-4], lambda data: data[:-1] + bytes([data[-1] ^ 64]), lambda data: b"PK\3\4" + data]
)
def test_a_damaged_shard_is_named_when_it_is_read_and_can_be_written_again(name, spoil, tmp_path):
    write(tmp_path, OBJECTS, encode, "a", shard_size=5)
    path = tmp_path / name
    path.write_bytes(spoil(path.read_bytes()))
    cache = FeatureCache(tmp_path, "a")
    assert cache.batch(["object0", "object22"])["query_features"][1, 0, 0] == 22
    with pytest.raises(ValueError, match=r"queries-00001\.npy"):
        cache.get("queries", "object9")
    path.unlink()
    assert write(tmp_path, OBJECTS, encode, "a", shard_size=5) == 5
    assert FeatureCache(tmp_path, "a").get("queries", "object9")[0, 0] == 9


def test_features_beyond_float16_are_named(tmp_path):
    def large(object_ids):
        return {"queries": encode(object_ids)["queries"] * 1e4}

    with pytest.raises(FloatingPointError, match="object7"):
        write(tmp_path, OBJECTS, large, "a")


def test_fingerprint_changes_with_weights_and_preprocessing(processor):
    from conftest import tiny_model

    model = tiny_model()
    first = feature_cache.fingerprint(model, processor.feature_extractor)
    assert feature_cache.fingerprint(tiny_model(), processor.feature_extractor) == first
    model.model.modality_projector[0].weight.data += 1  # trains, and comes after what is cached
    assert feature_cache.fingerprint(model, processor.feature_extractor) == first
    model.model.query_tokens.data[0, 0, 0] += 1e-3
    changed = feature_cache.fingerprint(model, processor.feature_extractor)
    assert changed != first


def test_a_view_is_the_same_in_every_process_and_the_first_half_keeps_the_pose(processor, monkeypatch):
    from conftest import CLOUDS, lively, tiny_model

    turned = []

    def remembered(points, rng, pose_free, fewest):
        turned.append(pose_free)
        return augment(points, rng, pose_free, fewest)

    monkeypatch.setattr(feature_cache, "augment", remembered)
    objects = sorted(path.name.removesuffix("_8192.npy") for path in CLOUDS.glob("*.npy"))[:2]
    names = [view_name(name, view) for name in objects for view in range(4)]

    def encode_views(names):
        encode = feature_cache.encoder_of(
            lively(tiny_model()), processor.feature_extractor, [CLOUDS], torch.device("cpu"), encoder=False, views=4
        )
        return encode(names)["queries"]

    together = encode_views(names)
    assert turned == [False, False, True, True] * 2
    apart = np.concatenate([encode_views([name]) for name in reversed(names)])[::-1]
    np.testing.assert_allclose(apart, together, rtol=1e-3, atol=1e-4)
    distances = [np.abs(together[i] - together[j]).max() for i in range(8) for j in range(i)]
    assert min(distances) > 1e-2, "no two views are alike"


def test_processes_beyond_the_cards_share_them(monkeypatch, tmp_path, capsys):
    from types import SimpleNamespace

    from pointalign import build, features, options, training_command
    from pointalign.data import dataset

    seen = []
    parsed = SimpleNamespace(data=SimpleNamespace(feature_cache=str(tmp_path)), model=None)
    monkeypatch.setattr(training_command, "prepare", lambda *_: None)
    monkeypatch.setattr(options, "parse", lambda *_: parsed)
    monkeypatch.setattr(dataset, "make_datasets", lambda _: [])
    monkeypatch.setattr(build, "build_model", lambda *_, **__: (None, None))
    monkeypatch.setattr(feature_cache, "write_for", lambda *given: seen.append(given[4:]) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        features.write([])
    assert seen == [(torch.device("cuda", rank % 2), rank, 4) for rank in range(4)]
    assert capsys.readouterr().out.count("entries in") == 1, "the first process reports"


def test_660_thousand_objects_are_mapped_not_read(tmp_path):
    """32 GB of features, in files with holes: the index is the only thing that is read."""
    count, shard_size, shape = 660_000, 4096, (32, 768)
    objects = [f"{i:032x}" for i in range(count)]
    shards = -(-count // shard_size)
    index = {"format": feature_cache.FORMAT, "fingerprint": "a", "objects": count, "shard_size": shard_size}
    index["objects_sha256"] = hashlib.sha256("\n".join(objects).encode()).hexdigest()
    empty, full = (zlib.crc32(np.full(shape, value, np.float16)) for value in (0, 5))
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "objects.json").write_text(json.dumps(objects))
    for shard in range(shards):
        rows = min(shard_size, count - shard * shard_size)
        path = tmp_path / f"queries-{shard:05d}.npy"
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f2", "fortran_order": False, "shape": (rows, *shape)}
            )
            file.truncate(file.tell() + rows * 2 * shape[0] * shape[1])
        checksums = np.full(rows, empty, "<u4")
        checksums[-1] = full if shard == shards - 1 else empty
        checksums.tofile(tmp_path / f"queries-{shard:05d}.crc")
    last = np.load(tmp_path / f"queries-{shards - 1:05d}.npy", mmap_mode="r+")
    last[-1] = 5
    last.flush()
    assert sum(one.stat().st_size for one in tmp_path.glob("*.npy")) > 32e9
    before = peak_resident_bytes()
    cache = FeatureCache(tmp_path, "a")
    batch = cache.batch([objects[0], objects[300_000], objects[-1]])["query_features"]
    assert batch.shape == (3, *shape) and batch.float().sum(dim=(1, 2)).tolist() == [0, 0, 5 * 32 * 768]
    assert peak_resident_bytes() - before < 400e6
