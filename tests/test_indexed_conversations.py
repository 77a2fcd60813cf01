"""Annotations at their real size: 660,000 entries indexed, not held."""

import json
import multiprocessing
import os
import resource
import time

import numpy as np
import pytest

from pointalign.data.conversations import AnnotationError, IndexedConversations, load_conversations
from pointalign.data.dataset import ConversationDataset
from pointalign.efficient.memory import peak_resident_bytes

ENTRIES = 660_000
LONG_TESTS = "POINTALIGN_LONG_TESTS" in os.environ


def entry(index, kind="single_round", text="A mug, grün und blau, with a “handle” 🙂."):
    turns = [{"from": "human", "value": "<point>\nWhat is this?"}, {"from": "gpt", "value": text}]
    return {"object_id": f"{index:032x}", "conversation_type": kind, "conversations": turns}


@pytest.mark.parametrize("block", [7, 1 << 22])
@pytest.mark.parametrize("form", [{}, {"ensure_ascii": False}, {"indent": 4, "ensure_ascii": False}])
def test_an_index_reads_what_the_list_holds(tmp_path, form, block, monkeypatch):
    from pointalign.data import conversations

    scan = conversations._scan
    monkeypatch.setattr(conversations, "_scan", lambda path: scan(path, block))
    path = tmp_path / "a.json"
    kinds = ["single_round", "multi_round", "detailed_description"]
    path.write_text(json.dumps([entry(i, kinds[i % 3]) for i in range(20)], **form), encoding="utf-8")
    for types in (None, ["multi_round"]):
        listed, indexed = load_conversations(path, types), IndexedConversations(path, types)
        assert list(indexed) == listed == indexed[:] and len(indexed) == len(listed)
        assert indexed[-1] == listed[-1] and indexed.object_ids == [one.object_ids for one in listed]
    indexed.keep(lambda ids: ids[0].endswith(("1", "4")))
    assert [one.object_ids[0][-1] for one in indexed] == ["1", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[",
        "[]",
        '[{"object_id": "a"}]',
        "[1, }",
        "[" + json.dumps(entry(1)),
        "[" + json.dumps(entry(1)) + "] x",
        *(
            json.dumps([entry(0), {**entry(1), "conversations": [question, answer]}])
            for question, answer in (
                ({"from": "human", "value": ["<point>"]}, {"from": "gpt", "value": "A chair."}),
                ({"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A chair."}),
                ({"from": "human", "value": "<point> or <point>?"}, {"from": "gpt", "value": "A chair."}),
                ({"from": "human", "value": "<point>?"}, {"from": "gpt", "value": "A <point>."}),
                ({"from": "human", "value": "<point>?"}, {"from": "gpt", "value": " "}),
                ({"from": "gpt", "value": "<point>?"}, {"from": "human", "value": "A chair."}),
            )
        ),
        json.dumps([{**entry(1), "object_id": "../a"}]),
        json.dumps([{**entry(1), "conversation_type": 3}]),
    ],
)
def test_errors_are_those_of_the_list(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(AnnotationError) as listed:
        load_conversations(path)
    with pytest.raises(AnnotationError) as indexed:
        IndexedConversations(path)
    assert str(listed.value) == str(indexed.value)


def measure(path, clouds, queue):
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    dataset = ConversationDataset(path, clouds)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    conversation = dataset.conversations[len(dataset) - 5]
    computing = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    queue.put((seconds, computing, peak_resident_bytes(), len(dataset), conversation.object_ids))


@pytest.mark.parametrize(
    "entries",
    [
        ENTRIES // 10,
        pytest.param(
            ENTRIES,
            marks=pytest.mark.skipif(not LONG_TESTS, reason="the full 660,000: run it by `make test-long`"),
        ),
    ],
)
def test_the_brief_captions_start_in_ten_seconds_and_two_gigabytes(entries, tmp_path, capsys):
    """A part of them in that part of the time."""
    path = tmp_path / "PointLLM_brief_description_660K.json"
    words = "A small wooden toy house with a red roof, two windows and a door that stands open on a grey base "
    words += "under it, with a lawn. "
    text = json.dumps(entry(0, "simple_description", words)).replace(f"{0:032x}", "%032x")
    with path.open("w") as file:
        file.write("[")
        for start in range(0, entries, 1000):
            file.write(",\n"[: 2 * bool(start)] + ",\n".join(text % i for i in range(start, start + 1000)))
        file.write("]")
    context = multiprocessing.get_context("spawn")  # the memory of this process does not count
    queue = context.Queue()
    limit = 10 * entries / ENTRIES
    for _ in range(3):  # a busy machine slows computing too: the fastest of three, where the first is too slow
        process = context.Process(target=measure, args=(path, tmp_path, queue))
        process.start()
        seconds, computing, memory, count, ids = queue.get(timeout=150)
        process.join()
        if computing < limit:
            break
    with capsys.disabled():
        size = path.stat().st_size / 1e6
        print(f" {size:.0f} MB: {seconds:.1f} s ({computing:.1f} s computing), {memory / 1e9:.2f} GB", end="")
    assert count == entries and ids == (f"{entries - 5:032x}",)
    assert computing < limit and memory < 2e9


def test_several_folders(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([entry(0), entry(1)]))
    for folder, index in (("first", 0), ("second", 1), ("second", 0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        cloud = np.random.default_rng(0).random((64, 6))
        cloud[:, 3:] = 0.5 if folder == "first" else 0.25
        np.save(tmp_path / folder / f"{index:032x}_8192.npy", cloud)
    dataset = ConversationDataset(path, [tmp_path / "first", tmp_path / "second"])
    clouds = [dataset[i]["messages"][0]["content"][0]["point"] for i in (0, 1)]
    assert clouds[0][0, 3] == 0.5 and clouds[1][0, 3] == 0.25
    with pytest.raises(NotADirectoryError, match="third"):
        ConversationDataset(path, [tmp_path / "first", tmp_path / "third"])
