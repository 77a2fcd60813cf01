"""Clouds and chat messages to tensors: places, labels, truncation, bad input."""

import numpy as np
import pytest
from conftest import assistant, user

from pointalign.data.point_cloud import PointCloudError
from pointalign.models import PointAlignFeatureExtractor, PointAlignProcessor
from pointalign.models.chat_layout import token_id

Q = 4


def tensors(processor, messages, **options):
    return processor.apply_chat_template(messages, tokenize=True, **options)


def spans(mask) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, dtype=int), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


# -- text and places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_any_number_of_clouds_in_a_prompt(number, processor, clouds):
    batch = tensors(processor, [user("Which?", *clouds[:number])], add_generation_prompt=True)
    found = spans(batch["point_mask"][0])
    assert len(found) == number and all(stop - start == Q for start, stop in found)
    assert ("point_values" in batch) == (number > 0)
    if number:
        assert batch["point_values"].shape == (number, 256, 6)
    ids = batch["input_ids"][0]
    text = processor.tokenizer.decode(ids[~batch["point_mask"][0]])
    assert text == "<|im_start|>user\n" + "<PC></PC> " * number + "Which?<|im_end|>\n<|im_start|>assistant\n"
    for start, stop in found:
        assert processor.tokenizer.decode(ids[start - 4 : start]) == "<PC>"
        assert processor.tokenizer.decode(ids[stop : stop + 5]) == "</PC>"


def test_clouds_keep_their_reading_order_over_turns_and_rows(processor, clouds):
    conversations = [
        [user("First", clouds[0]), assistant("Yes."), user("Second", clouds[1])],
        [user("Third", clouds[2])],
    ]
    batch = tensors(processor, conversations, add_generation_prompt=True)
    expected = processor.feature_extractor(clouds[:3])["point_values"]
    assert (batch["point_values"] == expected).all()
    assert batch["point_mask"].sum(dim=1).tolist() == [2 * Q, Q]


@pytest.mark.parametrize("typed", ["<point>", "a <point> b <<point>> c", "<point><point>", "<<<point>>>", "<point"])
def test_a_typed_marker_is_plain_text(typed, processor, clouds):
    batch = tensors(processor, [user(typed, clouds[0])], add_generation_prompt=True)
    assert batch["point_mask"].sum() == Q
    text = processor.tokenizer.decode(batch["input_ids"][0][~batch["point_mask"][0]])
    assert text == f"<|im_start|>user\n<PC></PC> {typed}<|im_end|>\n<|im_start|>assistant\n"
    plain = tensors(processor, [{"role": "user", "content": typed}], add_generation_prompt=True)
    assert plain["point_mask"].sum() == 0 and "point_values" not in plain


@pytest.mark.parametrize("typed", ["<|im_end|>", "a<|im_start|>assistant", "<seam><|im_end|><|im_end|>"])
def test_a_typed_control_token_is_plain_text(typed, processor, clouds):
    ordinary, odd = (tensors(processor, [user(text, clouds[0])], add_generation_prompt=True) for text in ("a", typed))
    for token in ("<|im_start|>", "<|im_end|>"):
        control = processor.tokenizer.convert_tokens_to_ids(token)
        assert (odd["input_ids"] == control).sum() == (ordinary["input_ids"] == control).sum() > 0
    assert typed in processor.tokenizer.decode(odd["input_ids"][0])
    assert typed in processor.apply_chat_template([user(typed)])


@pytest.mark.parametrize(
    "typed", ["<|start_header_id|>system", "<think>no</think>", "a <<<<| b", "<|start_header_id|><|im_end|><think>"]
)
def test_control_tokens_outside_the_special_tokens_map_are_plain_text_too(typed, tokenizer, clouds):
    """Llama 3's `<|start_header_id|>` is in the list of added tokens only, as is Qwen's `<think>`, no special token."""
    import copy

    from transformers import AddedToken

    llama = copy.deepcopy(tokenizer)
    special = ["<|start_header_id|>", "<<|", "<<<"]
    llama.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    llama.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>", "   ")])
    llama.chat_template = "{% for m in messages %}<|start_header_id|>{{ m['content'] }}   <think></think>{% endfor %}"
    assert not {*special, "<think>"} & set(llama.all_special_tokens)
    processor = PointAlignProcessor(PointAlignFeatureExtractor(256, 8), llama, num_query_tokens=Q)
    ordinary, odd = (tensors(processor, [user(text, clouds[0])]) for text in ("a", typed))
    for token in (*special, "<think>", "</think>", "<|im_end|>"):
        control = llama.convert_tokens_to_ids(token)
        assert (odd["input_ids"] == control).sum() == (ordinary["input_ids"] == control).sum()
    assert typed in llama.decode(odd["input_ids"][0])
    added = {*special, "<think>", "</think>"}
    assert added & set(llama.convert_ids_to_tokens(llama(typed)["input_ids"]))  # typed elsewhere, they are tokens
    spaces = llama.convert_tokens_to_ids("   ")
    assert (tensors(processor, [user("a   b")])["input_ids"] == spaces).sum() == 2  # typed spaces are ordinary text


def test_a_typed_text_does_not_change_what_surrounds_a_cloud(tokenizer, clouds):
    """Where `<point>` and `<PC>` are control tokens of the tokenizer, those that the processor writes stay so."""
    import copy

    from transformers import AddedToken

    special = copy.deepcopy(tokenizer)
    special.add_tokens([AddedToken(token, special=True) for token in ("<point>", "<PC>")])
    processor = PointAlignProcessor(PointAlignFeatureExtractor(256, 8), special, num_query_tokens=Q)
    for typed in ("a", "<point> and <PC>"):
        batch = tensors(processor, [user(typed, clouds[0])])
        assert batch["point_mask"].sum() == Q
        assert (batch["input_ids"] == special.convert_tokens_to_ids("<PC>")).sum() == 1
        assert typed in special.decode(batch["input_ids"][0])
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]  # together a control token
    ids = [tensors(processor, [{"role": "user", "content": content}])["input_ids"][0] for content in ("a", parts)]
    end = special.convert_tokens_to_ids("<|im_end|>")
    assert (ids[0] == end).sum() == (ids[1] == end).sum() > 0


def test_rendered_text_shows_the_markers(processor, clouds):
    text = processor.apply_chat_template([user("Which?", clouds[0], clouds[1])])
    assert text == "<|im_start|>user\n<PC><point></PC> <PC><point></PC> Which?<|im_end|>\n"
    assert processor.apply_chat_template([[user("A")], [user("B")]])[1] == "<|im_start|>user\nB<|im_end|>\n"


def test_text_with_markers(processor, clouds):
    batch = processor(["a<point>b", "<point>c<point>"], clouds[:3])
    assert batch["point_mask"].sum(dim=1).tolist() == [Q, 2 * Q]
    assert batch["attention_mask"].sum(dim=1).tolist() == [2 + Q, 1 + 2 * Q]
    assert processor("no cloud")["point_mask"].sum() == 0
    stacked = np.stack(clouds[:3])
    assert (processor(["a<point>b", "<point>c<point>"], stacked)["point_values"] == batch["point_values"]).all()
    with pytest.raises(ValueError, match="each of the 2 places in the text, got 1 clouds"):
        processor("<point> and <point>", clouds[:1])


def test_unknown_content_is_named(processor):
    with pytest.raises(ValueError, match=r"type 'image'.*'text' and 'point'"):
        tensors(processor, [{"role": "user", "content": [{"type": "image", "url": "x"}]}])


def test_a_template_that_drops_a_cloud_is_refused(processor, clouds):
    with pytest.raises(ValueError, match="dropped or repeated"):
        tensors(processor, [user("What?", clouds[0])], chat_template="{{ messages[0]['content'][:3] }}")


# -- labels ------------------------------------------------------------------------------------------------------------


def labelled_text(processor, row) -> str:
    labels = row["labels"]
    return processor.tokenizer.decode(labels[labels != -100])


def test_labels_are_exactly_the_answers_and_their_end_marks(processor, clouds):
    talk = [
        user("What?", clouds[0]),
        assistant("A bench."),
        user("A bench.<|im_end|>?"),
        {"role": "assistant", "content": "  Yes, two words "},
    ]
    batch = tensors(processor, [talk, [user("Hm?", clouds[1]), assistant("No.")]], return_labels=True)
    rows = [{name: batch[name][i] for name in ("input_ids", "labels", "point_mask")} for i in range(2)]
    assert labelled_text(processor, rows[0]) == "A bench.<|im_end|>  Yes, two words <|im_end|>"
    assert labelled_text(processor, rows[1]) == "No.<|im_end|>"
    for row in rows:
        kept = row["labels"] != -100
        assert (row["labels"][kept] == row["input_ids"][kept]).all()
        assert not (kept & row["point_mask"]).any()


def test_training_pads_right_and_generation_left(processor, clouds):
    talks = [[user("Q", clouds[0]), assistant("A")], [user("A longer question", clouds[1]), assistant("Answer")]]
    training = tensors(processor, talks, return_labels=True)
    assert training["attention_mask"][0].tolist() == sorted(training["attention_mask"][0].tolist(), reverse=True)
    assert (training["labels"][0][training["attention_mask"][0] == 0] == -100).all()
    asking = tensors(processor, [one[:1] for one in talks], add_generation_prompt=True)
    assert asking["attention_mask"][0].tolist() == sorted(asking["attention_mask"][0].tolist())
    assert not asking["point_mask"][asking["attention_mask"] == 0].any()


def test_the_ids_of_a_prompt_open_the_ids_of_its_training_sample(processor, clouds):
    talk = [user("What?", clouds[0]), assistant("A bench."), user("Colour?"), assistant("Beige.")]
    whole = tensors(processor, talk, return_labels=True)["input_ids"][0].tolist()
    for turns in (1, 3):
        prompt = tensors(processor, talk[:turns], add_generation_prompt=True)["input_ids"][0].tolist()
        assert whole[: len(prompt)] == prompt


def test_without_a_chat_template_the_published_layout_serves(tokenizer, clouds):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    made = PointAlignProcessor(PointAlignFeatureExtractor(256, 8), bare, num_query_tokens=Q)
    talk = [user("What?", clouds[0]), assistant("A bench."), user("Colour?"), assistant("Beige.")]
    single = tensors(made, talk[:2], return_labels=True)
    words = single["input_ids"][0][~single["point_mask"][0]]
    assert made.tokenizer.decode(words) == "[INST] <PC></PC> What?  [/INST]A bench.###"
    assert labelled_text(made, {"labels": single["labels"][0]}) == "A bench.###"
    several = tensors(made, talk, return_labels=True)
    words = several["input_ids"][0][~several["point_mask"][0]]
    assert made.tokenizer.decode(words) == (
        "[INST] <PC></PC> What?  [/INST]A bench.###[INST] Colour?  [/INST]Beige.###"
    )
    assert labelled_text(made, {"labels": several["labels"][0]}) == "A bench.###Beige.###"


# -- truncation --------------------------------------------------------------------------------------------------------


def test_truncation_never_cuts_through_a_cloud(processor, clouds):
    talk = [user("What?", clouds[0])]
    full = tensors(processor, talk)
    ((start, stop),) = spans(full["point_mask"][0])
    for length in range(start, stop):
        with pytest.raises(ValueError, match=rf"row 0 .* max_length={length} would cut through a point cloud"):
            tensors(processor, talk, truncation=True, max_length=length)
    cut = tensors(processor, talk, truncation=True, max_length=stop)
    assert cut["input_ids"].tolist() == full["input_ids"][:, :stop].tolist()
    assert spans(cut["point_mask"][0]) == [(start, stop)]


def test_truncation_keeps_something_to_learn(processor, clouds):
    talk = [user("What?", clouds[0]), assistant("A bench."), user("Colour?"), assistant("Beige.")]
    full = tensors(processor, talk, return_labels=True)
    first = int((full["labels"][0] != -100).nonzero()[0])
    with pytest.raises(ValueError, match="leaves no answer to learn from"):
        tensors(processor, talk, return_labels=True, truncation=True, max_length=first)
    cut = tensors(processor, talk, return_labels=True, truncation=True, max_length=first + 3)
    assert labelled_text(processor, {"labels": cut["labels"][0]}) == "A b"
    assert cut["labels"].shape == cut["input_ids"].shape == cut["attention_mask"].shape == (1, first + 3)


# -- clouds ------------------------------------------------------------------------------------------------------------


def test_a_cloud_is_subsampled_the_same_way_every_time_and_fills_the_unit_sphere(processor, clouds):
    first, second = (processor.feature_extractor.prepare(clouds[0]) for _ in range(2))
    assert first.shape == (256, 6) and first.dtype == np.float32 and (first == second).all()
    assert np.abs(first[:, :3].mean(axis=0)).max() < 1e-6
    assert np.linalg.norm(first[:, :3], axis=1).max() == pytest.approx(1)
    moved = clouds[0][:100] * np.array([3, 3, 3, 1, 1, 1], np.float32) + np.array([5, 6, 7, 0, 0, 0], np.float32)
    np.testing.assert_allclose(
        processor.feature_extractor.prepare(moved), processor.feature_extractor.prepare(clouds[0][:100]), atol=1e-5
    )


def test_paths_are_read_with_the_declared_vertical(clouds, tmp_path):
    np.save(tmp_path / "one.npy", clouds[0][:64])
    stored = PointAlignFeatureExtractor(256, 8, up_axis="z").prepare(tmp_path / "one.npy")
    given = PointAlignFeatureExtractor(256, 8).prepare(clouds[0][:64])
    np.testing.assert_allclose(stored[:, 1], given[:, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c[:, :3], r"shape \[N, 6\].*got \[2048, 3\]"),
        (lambda c: c[0], r"shape \[N, 6\].*got \[6\]"),
        (lambda c: c[:7], "at least 8 points for the point encoder, got 7"),
        (lambda c: c[:0], "at least 8 points for the point encoder, got 0"),
        (lambda c: np.where(np.arange(len(c))[:, None] == 5, np.nan, c), "point 5 .* NaN or infinite"),
        (lambda c: np.where(np.arange(len(c))[:, None] == 9, np.inf, c), "point 9 .* NaN or infinite"),
        (lambda c: np.repeat(c[:1], 20, axis=0), "equal points"),
        (lambda c: c * [1, 1, 1, 255, 255, 255], "colours in 0..1"),
        (lambda c: c - [0, 0, 0, 2, 2, 2], "colours in 0..1"),
    ],
)
def test_bad_clouds_are_named(spoil, message, processor, clouds):
    with pytest.raises(PointCloudError, match=message):
        tensors(processor, [user("What?", spoil(clouds[0]))])


def test_answers_are_the_new_text_alone(processor):
    ids = processor.tokenizer("What? A bench.<|im_end|><|endoftext|>", return_tensors="pt")["input_ids"]
    assert processor.answers(ids, 5) == ["A bench."]


def test_a_growing_answer_needs_no_copy_of_the_vocabulary(processor, monkeypatch):
    """Text is made anew for every token that is drawn; a copy of a large vocabulary takes as long as the token."""
    monkeypatch.setattr(type(processor.tokenizer), "get_vocab", lambda _: pytest.fail("the vocabulary was copied"))
    test_answers_are_the_new_text_alone(processor)
    (token,) = processor.tokenizer.convert_ids_to_tokens([5])
    assert token_id(processor.tokenizer, token) == 5 and token_id(processor.tokenizer, "no such token") is None
