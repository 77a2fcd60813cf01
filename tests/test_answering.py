"""Answers and their likelihoods, from features in place of clouds."""

import numpy as np
import pytest
import torch
from conftest import CLOUDS, NAMES, tiny_model

from pointalign.evaluation.answering import AnswerTree, Features, answer_likelihoods, prompt_batch, with_input
from pointalign.evaluation.choices import Question
from pointalign.evaluation.tasks import Task


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def features(model, processor):
    made = Features(model, processor)
    made.compute(NAMES, lambda name: np.load(CLOUDS / f"{name}_8192.npy").astype(np.float32))
    return made


def ask(*objects, text="What is this?"):
    return Question("/".join(objects) or "blind", objects, text, "truth")


def test_the_tree_of_answers_gives_what_each_answer_alone_gives(model, processor, features):
    answers = ["This is a chair.", "This is a cherry.", "No.", "This is"]
    ids = [processor.tokenizer(text)["input_ids"] for text in answers]
    tree = AnswerTree(ids)
    assert len(tree.tokens) < sum(map(len, ids))
    questions = [ask(NAMES[0]), ask(text="A text of another length, without a cloud"), ask(NAMES[1], NAMES[2])]
    batch = prompt_batch(processor, features, questions)
    found = answer_likelihoods(model, batch, tree)
    for row, question in enumerate(questions):
        for column, answer in enumerate(ids):
            alone = prompt_batch(processor, features, [question])
            width = alone["input_ids"].shape[1]
            tail = torch.tensor([answer])
            whole = torch.cat([alone["input_ids"], tail], dim=1)
            mask = alone.get("point_mask", torch.zeros_like(alone["input_ids"]).bool())
            mask = torch.nn.functional.pad(mask, (0, len(answer))) if question.object_ids else None
            with torch.inference_mode():
                logits = model(whole, point_mask=mask, query_features=alone.get("query_features")).logits
            expected = logits[0, width - 1 : -1].log_softmax(-1).gather(1, tail[0][:, None]).sum()
            assert found[row, column] == pytest.approx(expected.item(), abs=1e-3)


def test_features_stand_for_clouds(model, processor, features):
    cloud = np.load(CLOUDS / f"{NAMES[0]}_8192.npy").astype(np.float32)
    content = [{"type": "point", "point": cloud}, {"type": "text", "text": "What is this?"}]
    direct = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], tokenize=True, add_generation_prompt=True
    )
    with torch.inference_mode():
        expected = model(**direct).logits
        found = model(**prompt_batch(processor, features, [ask(NAMES[0])])).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_inputs_change_the_cloud_and_nothing_else(features):
    task = Task("t", "classification", "p", [ask(name) for name in NAMES])
    shuffled = with_input(task, "shuffled")
    assert sorted(q.object_ids for q in shuffled.questions) == sorted(q.object_ids for q in task.questions)
    assert all(
        a.object_ids != b.object_ids and a.id == b.id for a, b in zip(shuffled.questions, task.questions, strict=True)
    )
    zero = with_input(task, "zeroed").questions[0]
    assert features[list(zero.object_ids)].abs().sum() == 0
    assert with_input(task, "blind").questions[0].object_ids == ()
    with pytest.raises(ValueError, match="--inputs odd"):
        with_input(task, "odd")
