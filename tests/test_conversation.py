"""Answers as they grow: the same as at once, never taken back, and stopped when asked to."""

import threading

import numpy as np
import pytest
import torch
from conftest import lively, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from pointalign.certainty import generate_answers, hedge
from pointalign.conversation import Conversation, Decoding, settled


@pytest.fixture(scope="module")
def model():
    return lively(tiny_model())


def talk(model, processor, clouds) -> Conversation:
    return Conversation(model, processor, [cloud[:300] for cloud in clouds])


def test_words_grow_into_the_answer_of_generate(model, processor, clouds):
    conversation = talk(model, processor, clouds[:2])
    seen: list[str] = []
    answers = [conversation.ask(question, Decoding(24), seen.append) for question in ("Which?", "Why?")]
    messages: list[dict] = []
    for question, answer in zip(("Which?", "Why?"), answers, strict=True):
        content = [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if len(messages) == 1:
            content[:0] = [{"type": "point", "point": cloud[:300]} for cloud in clouds[:2]]
        batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        (expected,) = generate_answers(model, processor, batch, max_new_tokens=24, do_sample=False)
        assert answer == expected
        messages.append({"role": "assistant", "content": expected.text})
    assert conversation.turns == [("Which?", answers[0].text), ("Why?", answers[1].text)]
    assert all(any(answer.text.startswith(text) for answer in answers) for text in seen)


def test_each_word_is_told_once_the_next_begins(processor, model, clouds, monkeypatch):
    """The tiny model writes no spaces, so the tokens come from here."""
    text = "a chair with four\nlegs"
    tokens = processor.tokenizer(text)["input_ids"]

    def generate(*_, streamer, **__):
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token in tokens:
            streamer.put(torch.tensor([token]))
        streamer.end()
        raise ValueError("enough")

    monkeypatch.setattr(model, "generate", generate)
    seen: list[str] = []
    conversation = talk(model, processor, clouds[:1])
    with pytest.raises(ValueError, match="enough"):
        conversation.ask("What?", Decoding(64), seen.append)
    assert seen == ["a", "a chair", "a chair with", "a chair with four"]
    assert conversation.turns == [], "a question without an answer leaves no trace"


def test_a_draw_repeats_with_its_seed_and_leaves_the_global_generator_alone(model, processor, clouds):
    def draw(seed: int) -> str:
        return talk(model, processor, clouds[:1]).ask("What?", Decoding(24, temperature=1.0, seed=seed)).text

    state = torch.get_rng_state()
    answers = [draw(0), draw(0), draw(1)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(state, torch.get_rng_state())


class After(threading.Event):
    """Is set once it has been looked at so many times."""

    def __init__(self, looks: int):
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


def test_a_stopped_answer_ends_with_the_token_under_way(model, processor, clouds, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    lengths = []
    original = processor.answers
    monkeypatch.setattr(
        type(processor),
        "answers",
        lambda _, ids, prompt: (lengths.append(ids.shape[1] - prompt), original(ids, prompt))[1],
    )
    talk(model, processor, clouds[:1]).ask("What?", Decoding(12), stop=After(3))
    talk(model, processor, clouds[:1]).ask("What?", Decoding(12), stop=threading.Event())
    assert lengths == [3, 12]


def test_a_conversation_that_is_too_long_says_so(model, processor, clouds):
    with pytest.raises(ValueError, match="reads 1024 at most"):
        talk(model, processor, clouds[:1]).ask("word " * 300)


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="temperature=-1"):
        Decoding(temperature=-1)
    with pytest.raises(ValueError, match="temperature=nan"):
        Decoding(temperature=float("nan"))
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Decoding(max_new_tokens=0)


WORDS = st.sampled_from(["This", "These", "is", "are", "a", "door", "door.", "It", "and", "with two panes", "\n"])


@given(st.lists(WORDS, max_size=12).map(" ".join), st.booleans())
def test_what_is_told_is_never_taken_back(text, may_hedge):
    final = hedge(text.strip()) if may_hedge else text.strip()
    for end in range(len(text) + 1):
        assert final.startswith(settled(text[:end].strip(), may_hedge))


def test_a_name_is_held_back_but_a_description_flows():
    assert settled("This is a door.", True) == ""
    assert settled("This is a door with two panes and", True) == "This is a door with two panes"
    assert settled("This is a door.", False) == "This is a"
    assert settled("It is wi", True) == "It is"


def test_points_keep_their_order(model, processor, clouds):
    """The second cloud is the second: exchanging both changes the prompt's features."""
    first = talk(model, processor, clouds[:2]).messages("Which?")[0]["content"]
    assert [item["type"] for item in first] == ["point", "point", "text"]
    np.testing.assert_array_equal(first[0]["point"], clouds[0][:300])
