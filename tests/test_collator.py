"""Samples to padded batches, with and without augmentation."""

import json
from pathlib import Path

import pytest
import torch

from pointalign.data.collator import ConversationCollator, check_lengths
from pointalign.data.dataset import ConversationDataset

CLOUDS = Path(__file__).parent / "clouds"


@pytest.fixture(scope="module")
def samples():
    dataset = ConversationDataset(CLOUDS / "annotations.json", CLOUDS)
    kinds = {}
    for i, conversation in enumerate(dataset.conversations):
        kinds.setdefault(conversation.conversation_type, dataset[i])
    return [kinds[name] for name in ("simple_description", "detailed_description", "multi_round")]


def test_a_batch_has_labels_on_every_answer(samples, processor):
    batch = ConversationCollator(processor, max_length=512)(samples)
    assert type(batch) is dict and all(isinstance(one, torch.Tensor) for one in batch.values())
    assert batch["point_values"].shape == (3, 256, 6)
    for row, sample in enumerate(samples):
        labels = batch["labels"][row]
        text = processor.tokenizer.decode(labels[labels != -100])
        spoken = [m["content"][0]["text"] for m in sample["messages"] if m["role"] == "assistant"]
        assert text == "".join(f"{one}<|im_end|>" for one in spoken)


def test_without_augmentation_no_random_number_is_drawn(samples, processor):
    collate = ConversationCollator(processor, max_length=512)
    state = torch.get_rng_state()
    first, second = collate(samples), collate(samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_augmentation_depends_on_epoch_and_sample_only(samples, processor):
    collate = ConversationCollator(processor, max_length=512, augmentation=True)
    epochs = (0, 0, 1)
    batches = [collate([sample | {"draw": (epoch, 5)} for sample in samples]) for epoch in epochs]
    assert torch.equal(batches[0]["point_values"], batches[1]["point_values"])
    assert not torch.equal(batches[0]["point_values"], batches[2]["point_values"])
    assert torch.equal(batches[0]["input_ids"], batches[2]["input_ids"])


class NamesOnly:
    """A feature cache that remembers what it is asked for."""

    def batch(self, names):
        self.names = list(names)
        return {}


def views_read(samples, processor, views=8) -> list[str]:
    cache = NamesOnly()
    ConversationCollator(processor, max_length=512, features=cache, views=views)(samples)
    return cache.names


def test_the_view_that_a_sample_reads_depends_on_its_draw_only(samples, processor):
    drawn = [sample | {"draw": (0, number)} for number, sample in enumerate(samples)]
    names = views_read(drawn, processor)
    assert names == [name for sample in drawn for name in views_read([sample], processor)]
    assert views_read(drawn[::-1], processor) == names[::-1]
    assert [name.rpartition("#")[0] for name in names] == [i for sample in drawn for i in sample["object_ids"]]
    epochs = {tuple(views_read([samples[0] | {"draw": (epoch, 5)}], processor)) for epoch in range(10)}
    assert len(epochs) > 2, "another epoch reads other views"


def test_what_speaks_of_pose_reads_the_views_that_keep_it(samples, processor):
    for sample, numbers in zip(samples, (range(8), range(4), range(4)), strict=True):
        names = [name for draw in range(60) for name in views_read([sample | {"draw": (draw, 0)}], processor)]
        assert {int(name.rpartition("#")[2]) for name in names} == set(numbers), sample["conversation_type"]


def test_without_views_a_sample_reads_its_object(samples, processor):
    assert views_read(samples, processor, views=0) == [i for sample in samples for i in sample["object_ids"]]


def test_only_what_does_not_speak_of_pose_is_turned(samples, processor, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "pointalign.data.collator.augment", lambda points, rng, free, fewest: seen.append((free, fewest)) or points
    )
    ConversationCollator(processor, max_length=512, augmentation=True)(samples)
    assert seen == [(True, 8), (False, 8), (False, 8)]


def test_small_clouds_survive_augmentation(samples, processor):
    content = samples[0]["messages"][0]["content"]
    few = [item | {"point": item["point"][:9]} if item["type"] == "point" else item for item in content]
    sample = samples[0] | {"messages": [samples[0]["messages"][0] | {"content": few}, *samples[0]["messages"][1:]]}
    collate = ConversationCollator(processor, max_length=512, augmentation=True)
    for _ in range(10):
        assert 8 <= collate([sample])["point_values"].shape[1] <= 9


def test_a_sample_that_does_not_fit_is_an_error(samples, processor):
    with pytest.raises(ValueError, match="would cut through a point cloud"):
        ConversationCollator(processor, max_length=11)(samples)
    with pytest.raises(ValueError, match="leaves no answer"):
        ConversationCollator(processor, max_length=26)(samples)


@pytest.mark.parametrize("packing", [False, True])
def test_text_alone_and_clouds_in_later_turns_train_beside_the_others(tmp_path, processor, packing):
    """Mixed in a batch and as a batch of their own, with both losses."""
    from conftest import tiny_model

    from pointalign.alignment import AlignmentConfig
    from pointalign.trainer import AlignedModel

    name = next(CLOUDS.glob("*_8192.npy")).name.removesuffix("_8192.npy")
    texts = {
        "first": ("<point>\nWhat is it?", "A chair."),
        "later": ("Hello.", "Hi.", "What is <point> here?", "A chair."),
        "alone": ("What is a chair?", "Something to sit on."),
    }
    entries = [
        {"object_id": None if kind == "alone" else name,
         "conversations": [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(turns)]}
        for kind, turns in texts.items()
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    dataset = ConversationDataset(tmp_path / "a.jsonl", CLOUDS)
    collate = ConversationCollator(processor, max_length=256, augmentation=True, packing=packing)
    aligned = AlignedModel(tiny_model(), AlignmentConfig(layer=[1], weight=1.0)).train()
    for members, clouds in (((0, 1, 2), 2), ((2,), 0), ((1, 2), 1)):
        batch = collate([dataset[i] for i in members])
        assert int(batch["point_mask"].sum()) == 4 * clouds and ("point_values" in batch) == bool(clouds)
        losses = aligned(**batch)
        assert losses["loss"].isfinite() and losses["ntp_loss"] > 0
        assert bool(losses["alignment_loss"] > 0) == bool(clouds)
        losses["loss"].backward()


# -- samples that are too long -----------------------------------------------------------------------------------------


def entry(object_id, question, answer="A thing."):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"object_id": object_id, "conversations": turns}


@pytest.fixture
def long_samples(tmp_path):
    names = sorted({e["object_id"] for e in json.loads((CLOUDS / "annotations.json").read_text())})
    entries = [
        entry(names[0], "<point>\nWhat?"),
        entry(names[1], f"{'Well, ' * 60}<point> what?"),  # the cut would go through the cloud
        entry(names[2], f"<point> {'And so on, ' * 30} what?"),  # no answer is left
        entry(names[3], "<point>\nWhat?", "A long thing. " * 30),  # the answer is cut
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(entries))
    return ConversationDataset(path, CLOUDS), names


def test_samples_that_cannot_be_cut_are_named_by_object_before_training(long_samples, processor):
    dataset, names = long_samples
    with pytest.raises(ValueError) as error:
        check_lengths(dataset, processor, max_length=200)
    message = str(error.value)
    assert "2 of 4 samples cannot be used" in message and "data.skip_long true" in message
    assert f"{names[1]}: has" in message and "would cut through a point cloud" in message
    assert f"{names[2]}: has" in message and "leaves no answer" in message
    assert names[0] not in message and names[3] not in message


def test_long_samples_are_dropped_and_counted_where_that_is_asked(long_samples, processor):
    dataset, names = long_samples
    report = check_lengths(dataset, processor, max_length=200, skip_long=True)
    assert "2 samples were dropped, 2 are left" in report and f"{names[1]}: has" in report
    assert "1 samples are longer than 200 tokens and are cut" in report
    assert [ids for (ids,) in dataset.conversations.object_ids] == [names[0], names[3]]
    ConversationCollator(processor, max_length=200)([dataset[0], dataset[1]])
    assert check_lengths(dataset, processor, max_length=9000) == ""


def test_only_samples_that_may_be_too_long_are_tokenised(long_samples, processor, monkeypatch):
    dataset, _ = long_samples
    read = []
    original = type(dataset.conversations).__getitem__
    monkeypatch.setattr(
        type(dataset.conversations), "__getitem__", lambda self, place: read.append(place) or original(self, place)
    )
    check_lengths(dataset, processor, max_length=200, skip_long=True)
    assert read == [1, 2, 3]


def test_a_sample_that_the_chat_template_refuses_is_named(long_samples, processor):
    dataset, names = long_samples
    import copy

    strict = copy.copy(processor)
    strict.chat_template = (
        "{% for m in messages %}{% if m.content | length > 250 %}{{ raise_exception('too long') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=rf"{names[1]}: the chat template refuses turns of user, assistant: too long"):
        check_lengths(dataset, strict, max_length=200)
