"""Uncertain names are hedged, with a threshold that separates right from wrong answers."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from pointalign.certainty import calibrated_threshold, generate_answers, hedge, is_hedged
from pointalign.evaluation.naming import head_noun


@pytest.mark.parametrize(
    ("plain", "hedged"),
    [
        ("This is a door.", "It looks like a door."),
        ("These are shelves.", "They look like shelves."),
        ("This is a trash can.", "It looks like a trash can."),
        ("Yes, it is a door.", "Yes, it is a door."),
        ("This is a door. It is mostly white.", "This is a door. It is mostly white."),
        ("", ""),
    ],
)
def test_names_are_hedged_and_other_texts_stay(plain, hedged):
    assert hedge(plain) == hedged and is_hedged(hedged) == (plain != hedged)
    assert head_noun(plain) == head_noun(hedged), "a hedged name is the same name"


def test_the_threshold_separates_right_from_wrong():
    assert 0.5 < calibrated_threshold([0.9, 0.8, 0.7, 0.5, 0.2], [1, 1, 1, 0, 0]) < 0.7
    assert calibrated_threshold([0.9, 0.1], [1, 1]) == calibrated_threshold([0.9, 0.1], [0, 0]) == 0.0
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.5
    values = np.where(right, rng.normal(0.6, 0.1, 400), rng.normal(0.4, 0.1, 400))
    assert calibrated_threshold(values, right) == pytest.approx(0.5, abs=0.05)


def test_the_probability_is_that_of_the_generated_tokens(processor, clouds):
    model = tiny_model().eval()
    questions = ("What is this?", "Is it a rather long question about the colour of this object, or not?")
    conversations = [
        [{"role": "user", "content": [{"type": "point", "point": clouds[i]}, {"type": "text", "text": text}]}]
        for i, text in enumerate(questions)
    ]
    batch = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
    answers = generate_answers(model, processor, batch, max_new_tokens=5, do_sample=False)
    assert [answer.text for answer in answers] == processor.answers(
        model.generate(**batch, max_new_tokens=5, do_sample=False), batch["input_ids"].shape[1]
    )
    generated = model.generate(**batch, max_new_tokens=5, do_sample=False)
    width = batch["input_ids"].shape[1]
    complete = {
        "input_ids": generated,
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1),
        "point_mask": torch.nn.functional.pad(batch["point_mask"], (0, 5), value=False),
    }
    with torch.inference_mode():
        clouds_of_batch = {name: batch[name] for name in ("point_values", "point_lengths")}
        logits = model(**complete, **clouds_of_batch).logits.float().log_softmax(dim=-1)
    tokens = generated[:, width:]
    logs = logits[:, width - 1 : -1].gather(2, tokens[..., None])[..., 0]
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if processor.tokenizer.pad_token_id is not None:
        counted &= (tokens != processor.tokenizer.pad_token_id) | ((tokens == tokens[:, -1:]).cumsum(1) <= 1)
    expected = (logs * counted).sum(dim=1).exp()
    assert [answer.probability for answer in answers] == pytest.approx(expected.tolist(), rel=1e-3)
    sampled = generate_answers(model, processor, batch, max_new_tokens=2, do_sample=True)
    assert all(np.isnan(answer.probability) for answer in sampled)


def test_a_model_hedges_below_its_threshold(processor, clouds, monkeypatch):
    model = tiny_model().eval()
    monkeypatch.setattr(processor, "answers", lambda generated, length: ["This is a door."])
    messages = [{"role": "user", "content": [{"type": "point", "point": clouds[0]}, {"type": "text", "text": "What?"}]}]
    batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    for threshold, text in ((0.0, "This is a door."), (1.0, "It looks like a door.")):
        model.config.name_threshold = threshold
        (answer,) = generate_answers(model, processor, batch, max_new_tokens=2, do_sample=False)
        assert answer.text == text and 0 < answer.probability < 1
