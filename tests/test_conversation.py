"""Answers as they grow: the same as at once, never taken back, and stopped when asked to."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from conftest import lively, make_processor, tiny_config, tiny_model, tiny_text_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig

from pointalign.certainty import Answer, generate_answers, hedge
from pointalign.conversation import Conversation, Decoding, settled
from pointalign.models import PointAlignForConditionalGeneration


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
        assert (answer.text, answer.tokens) == (expected.text, expected.tokens)
        assert answer.probability == pytest.approx(expected.probability, rel=1e-4), "keys are rounded in another order"
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


# -- each turn is read once -------------------------------------------------------------------------------------------


def asked(conversation: Conversation, question: str, decoding: Decoding | None = None) -> tuple[Answer, int, int]:
    """The answer, how many tokens were read for its first token, and how many the prompt has.

    Its tokens are those of a new conversation with the same turns, which reads everything.
    """
    decoding = decoding or Decoding(12)
    read: list[int] = []
    hook = conversation.model.get_decoder().register_forward_pre_hook(
        lambda _module, _values, options: read.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    new = Conversation(conversation.model, conversation.processor, conversation.clouds, conversation.generation)
    new.turns = list(conversation.turns)
    try:
        answer, first = conversation.ask(question, decoding), read[0]
        read.clear()
        expected = new.ask(question, decoding)
    finally:
        hook.remove()
    assert len(answer.tokens) > 1 and answer.tokens == expected.tokens
    return answer, first, read[0]


QUESTIONS = ("Which?", "Why?", "How tall is it?", "Why?")


@pytest.mark.parametrize("architecture", ["llama", "phi", "qwen3"])
def test_a_turn_reads_only_what_is_new(architecture, processor, clouds):
    conversation = talk(lively(tiny_model(architecture)), processor, clouds[:2])
    rows = [asked(conversation, question)[1:] for question in QUESTIONS]
    lengths = [length for _, length in rows]
    assert rows[0][0] == lengths[0]
    for turn in (1, 2, 3):  # in ChatML every prompt is the beginning of the next
        assert rows[turn][0] <= lengths[turn] - lengths[turn - 1]


def test_drawn_answers_are_those_of_the_whole_conversation(model, processor, clouds):
    conversation = talk(model, processor, clouds[:1])
    drawn = [asked(conversation, "Why?", Decoding(12, temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert drawn[0][0].tokens != drawn[1][0].tokens
    assert all(first < length for _, first, length in drawn[1:])


def test_other_clouds_are_read_anew(model, processor, clouds):
    conversation = talk(model, processor, clouds[:2])
    asked(conversation, "Which?")
    conversation.clouds = [cloud.copy() for cloud in conversation.clouds]  # the page makes new arrays for every turn
    _, first, length = asked(conversation, "Why?")
    assert first < length
    for changed in ([clouds[0][:300], clouds[2][:300]], [clouds[0][:300]], [clouds[0][:200].copy()]):
        conversation.clouds = changed
        _, first, length = asked(conversation, "Why?")
        assert first == length
    conversation.clouds[0][0, 0] += 0.1  # in place
    _, first, length = asked(conversation, "Why?")
    assert first == length


def test_edited_and_cleared_turns_keep_what_is_before_them(model, processor, clouds):
    conversation = talk(model, processor, clouds[:1])
    prompts = [asked(conversation, question)[2] for question in ("What is this?", "What colour is it?", "Why?")]
    conversation.turns[1] = ("What colour is it?", "Green.")
    _, first, length = asked(conversation, "And now?")
    assert length - prompts[1] - len("Green.") < first <= length - prompts[1]
    conversation.turns.clear()
    assert asked(conversation, "Who made it?")[1] == len("o made it?") + len("~\n~assistant\n"), "all behind 'Wh'"


def test_of_a_prompt_that_the_template_rewrites_the_common_beginning_is_kept(model, tokenizer, clouds):
    rewritten = (
        "{% if HEAD %}{{ messages | length }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last %}Be brief. {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = make_processor(tokenizer)
    processor.chat_template = rewritten.replace("HEAD", "false")
    conversation = talk(model, processor, clouds[:1])
    lengths = [asked(conversation, question)[1:] for question in QUESTIONS[:3]]
    assert lengths[1][0] == lengths[1][1], "the words before the cloud are gone in the second turn"
    assert lengths[1][1] - lengths[0][1] < lengths[2][0] < lengths[2][1]
    processor.chat_template = rewritten.replace("HEAD", "true")
    assert all(first == length for _, first, length in [asked(conversation, question) for question in QUESTIONS[:2]])


@pytest.mark.parametrize("kind", ["beams", "lookup", "static", "no cache", "window", "longrope", "16 bits", "option"])
def test_where_a_cache_cannot_go_back_everything_is_read(kind, processor, clouds):
    model = lively(tiny_model())
    options = {"repetition_penalty": 1.1} if kind == "option" else None
    settings = {
        "beams": ("num_beams", 2),
        "lookup": ("prompt_lookup_num_tokens", 3),
        "static": ("cache_implementation", "static"),
        "no cache": ("use_cache", False),
    }
    if kind in settings:
        setattr(model.generation_config, *settings[kind])
    elif kind == "window":
        config = tiny_config()
        values = tiny_text_config().to_dict() | {"model_type": "mistral", "sliding_window": 16}
        config.text_config = MistralConfig(**values)
        model = lively(PointAlignForConditionalGeneration(config).eval())
    elif kind == "longrope":
        model.config.text_config.rope_parameters = {"rope_type": "longrope"}
    elif kind == "16 bits":
        model.model.language_model.bfloat16()
    conversation = Conversation(model, processor, [clouds[0][:300]], options)
    for question in QUESTIONS[:3]:
        _, first, length = asked(conversation, question)
        assert first == length
    assert conversation._read is None


def test_an_answer_that_fails_leaves_no_half_read_turn(model, processor, clouds):
    conversation = talk(model, processor, clouds[:1])
    asked(conversation, "Which?")

    class Failing(threading.Event):
        def is_set(self) -> bool:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        conversation.ask("Why?", Decoding(12), stop=Failing())
    _, first, length = asked(conversation, "Why?")
    assert first == length
    conversation.ask("Why?", Decoding(12), stop=After(3))
    _, first, length = asked(conversation, "How?")
    assert first < length, "a stopped answer is part of the conversation"


def test_keys_and_values_go_with_the_conversation(model, processor, clouds):
    conversation = talk(model, processor, clouds[:1])
    asked(conversation, "Which?")
    cache = weakref.ref(conversation._read.cache)
    assert cache() is not None
    del conversation
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("places_read", ["before the cloud", "behind the cloud"])
@pytest.mark.parametrize("form", ["all tokens", "new tokens"])
def test_generation_goes_on_from_a_cache_that_the_caller_filled(places_read, form, model, processor, clouds):
    conversation = talk(model, processor, clouds[:1])
    batch = dict(conversation._prompt("Which?"))
    whole = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    places = batch["point_mask"][0].nonzero().flatten()
    read = int(places[0]) - 1 if places_read == "before the cloud" else int(places[-1]) + 2
    beginning = {name: batch[name][:, :read] for name in ("input_ids", "attention_mask", "point_mask")}
    seen = batch | beginning if places_read == "behind the cloud" else beginning
    cache = DynamicCache(config=model.config.get_text_config())
    model(**seen, past_key_values=cache, use_cache=True)
    if form == "new tokens":
        batch |= {name: batch[name][:, read:] for name in ("input_ids", "point_mask")}
    if places_read == "behind the cloud" and form == "new tokens":
        batch = {name: value for name, value in batch.items() if name not in ("point_values", "point_lengths")}
    going_on = model.generate(**batch, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert going_on[0, batch["input_ids"].shape[1] :].tolist() == whole.tolist()
