"""Chat templates as well-known models have them: training on several turns, and the next question of a talk."""

import json

import pytest
import torch
from conftest import assistant, lively, tiny_config, user
from made_templates import LAYOUTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from pointalign import chat
from pointalign.models import (
    PointAlignFeatureExtractor,
    PointAlignForConditionalGeneration,
    PointAlignProcessor,
    chat_layout,
)

ENDS = {
    "llama3": "<|eot_id|>", "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>",
    "phi3": "<|end|>", "phi4": "<|im_end|>", "mistral": "<|endoftext|>", "smollm2": "<|im_end|>",
    "smollm3": "<|im_end|>",
}  # fmt: skip


def make_processor(name: str) -> PointAlignProcessor:
    """A byte-level tokenizer with the control tokens of the layout, whose EOS is not always the end of an answer."""
    template, controls, bos = LAYOUTS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", bos_token=bos)
    thoughts = ("<think>", "</think>")
    made.add_tokens([AddedToken(token, special=token not in thoughts, normalized=False) for token in controls])
    made.chat_template = template
    return PointAlignProcessor(PointAlignFeatureExtractor(256, 8), made, num_query_tokens=4)


@pytest.fixture(params=LAYOUTS)
def name(request):
    return request.param


TALK = [user("What?"), assistant("A bench."), user("Colour?"), assistant("Beige.")]


def test_labels_of_two_turns_are_the_answers_and_their_end_marks_alone(name, clouds):
    processor = make_processor(name)
    talk = [user("What?", clouds[0]), *TALK[1:]]
    batch = processor.apply_chat_template(talk, tokenize=True, return_labels=True)
    labels = batch["labels"][batch["labels"] != -100]
    text = processor.tokenizer.decode(labels)
    assert text == f"A bench.{ENDS[name]}Beige.{ENDS[name]}"
    assert batch["point_mask"].sum() == 4
    single = processor.apply_chat_template(talk[:2], tokenize=True, return_labels=True)
    assert processor.tokenizer.decode(single["labels"][single["labels"] != -100]) == f"A bench.{ENDS[name]}"


def test_what_is_trained_is_what_is_asked(name, clouds):
    """A question's ids, after however many turns, open the ids of the sample that ends with its answer."""
    processor = make_processor(name)
    for turns in (2, 4):
        sample = processor.apply_chat_template(TALK[:turns], tokenize=True, return_labels=True)["input_ids"][0]
        prompt = processor.apply_chat_template(TALK[: turns - 1], tokenize=True, add_generation_prompt=True)
        prompt = prompt["input_ids"][0]
        assert sample[: len(prompt)].tolist() == prompt.tolist()
        answer = processor.tokenizer.decode(sample[len(prompt) :])
        assert answer.startswith(TALK[turns - 1]["content"][0]["text"] + ENDS[name])


SYSTEM_TEXTS = {"qwen2.5": "Be kind.", "smollm2": "Be brief."}  # that a template writes by itself


def test_the_text_of_the_system_turn_is_left_out_and_nothing_else(name, tmp_path):
    processor = make_processor(name)
    template = chat_layout.without_system_text(processor.tokenizer)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bench."}]
    full, short = (
        chat_layout.render(processor.tokenizer, each, messages, False) for each in (processor.chat_template, template)
    )
    text = SYSTEM_TEXTS.get(name, "")
    assert text in full and short == full.replace(text, "")
    if not text:
        return
    explicit = [{"role": "system", "content": "Answer."}, *messages]
    assert chat_layout.render(processor.tokenizer, template, explicit, False) == full.replace(text, "Answer.")
    shorter = PointAlignProcessor(processor.feature_extractor, processor.tokenizer, chat_template=template)
    shorter.save_pretrained(tmp_path)
    assert PointAlignProcessor.from_pretrained(tmp_path).chat_template == template


def test_an_answer_ends_a_reply(name):
    processor = make_processor(name)
    end = processor.tokenizer.convert_tokens_to_ids(ENDS[name])
    assert processor.end_token_ids([3]) == list(dict.fromkeys([processor.tokenizer.eos_token_id, 3, end]))
    generated = torch.tensor([[1, *processor.tokenizer(f" A cup.{ENDS[name]}and so on")["input_ids"]]])
    assert processor.answers(generated, 1) == ["A cup."]


def test_a_model_that_can_think_answers_without(clouds):
    for name in ("qwen3", "smollm3"):
        prompt = make_processor(name).apply_chat_template(TALK[:3], add_generation_prompt=True)
        assert prompt.rstrip().endswith("<|im_start|>assistant\n<think>\n\n</think>")
        earlier = prompt.partition("A bench.")[0]
        assert earlier.endswith("<|im_start|>assistant\n" if name == "qwen3" else "</think>\n")


def test_spaces_around_an_answer_go_where_the_template_removes_them(name):
    processor = make_processor(name)
    batch = processor.apply_chat_template([user("Q"), assistant(" A ")], tokenize=True, return_labels=True)
    text = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    trimmed = name in ("llama3", "gemma3", "mistral")
    assert text == ("A" if trimmed else " A ") + ENDS[name]


def test_a_sample_has_the_same_tokens_on_every_day(monkeypatch):
    from datetime import datetime

    from transformers.utils import chat_template_utils

    texts = []
    for day in (1, 2):

        class Clock(datetime):
            @classmethod
            def now(cls, *_, day=day):
                return cls(2031, 5, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        texts += [make_processor(name).apply_chat_template(TALK) for name in ("llama3", "smollm3")]
    assert texts[:2] == texts[2:] and "26 Jul" in texts[0]


def test_turns_that_a_template_refuses_or_leaves_out_are_an_error():
    processor = make_processor("gemma3")
    with pytest.raises(ValueError, match="refuses turns of user, user: roles must alternate"):
        processor.apply_chat_template([user("A"), user("B")], tokenize=True)
    with pytest.raises(ValueError, match="leaves out or repeats turns: it wrote 1 of 2 answers"):
        processor.apply_chat_template(TALK, chat_template="{% for m in messages[-1:] %}{{ m.content }}{% endfor %}")


def test_typed_thoughts_and_marks_stay_in_an_answer():
    """A typed `</think>`, or the mark that stands for an answer while the template is rendered, is plain text."""
    processor = make_processor("qwen3")
    typed = f"a</think>b {chat_layout.ANSWER} c"
    talk = [user(typed), assistant(typed), user("Q"), assistant("A")]
    batch = processor.apply_chat_template(talk, tokenize=True, return_labels=True)
    text = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert text == f"{typed}<|im_end|>A<|im_end|>"


@pytest.mark.parametrize("layout", ["qwen3", "gemma3"])
def test_a_second_question_in_chat(layout, tmp_path, clouds, capsys):
    import numpy as np

    processor = make_processor(layout)
    config = tiny_config()
    config.text_config.vocab_size = len(processor.tokenizer)
    lively(PointAlignForConditionalGeneration(config)).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "pointalign"
    np.save(tmp_path / "cloud.npy", clouds[0])
    talk = [str(tmp_path / "cloud.npy"), "--model", str(tmp_path / "model"), "--max-new-tokens", "3"]
    assert chat.main([*talk, "--question", "What?", "--question", "Why?"]) == 0
    assert "> Why?" in capsys.readouterr().out
