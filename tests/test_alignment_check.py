"""The check that tells a language model that moves from a projector that learns."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CLOUDS, lively, tiny_model
from torch.nn import functional

from experiments import alignment_check
from experiments.alignment_check import _compare, answer, compare, measure
from pointalign import allocator, assets, options, train
from pointalign.alignment import AlignmentConfig
from pointalign.evaluation import tasks
from pointalign.trainer import AlignedModel


def aligned_model(seed: int = 0) -> AlignedModel:
    torch.manual_seed(seed)
    return AlignedModel(lively(tiny_model()), AlignmentConfig(weight=0.1, layer=[2]))


def test_own_and_others_are_means_over_query_tokens():
    own = torch.eye(4).reshape(2, 2, 4)  # two objects of two tokens, all at right angles
    assert _compare(3 * own, own) == ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0])
    assert _compare(own.flip(0), own) == ([0.0, 0.0], [1.0, 1.0], [0.0, 0.0])
    half = torch.stack([own[0], torch.stack([own[1, 0], own[0, 1]])])  # one token of the second object is the first's
    assert _compare(half, own) == ([1.0, 0.5], [0.0, 0.5], [1.0, 0.0])


def test_what_is_compared_are_projected_states_and_qformer_tokens(processor, clouds):
    aligned = aligned_model()
    found = measure(aligned, processor, clouds[:3], batch_size=2)
    content = [{"type": "point", "point": clouds[1]}, {"type": "text", "text": "What is this?"}]
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": content}]], tokenize=True, add_generation_prompt=True
    )
    with torch.inference_mode():
        hidden = aligned.model(**batch, output_hidden_states=True).hidden_states[2][batch["point_mask"]]
        tokens = aligned.model.get_qformer_features(batch["point_values"], batch["point_lengths"])[0]
        cosine = functional.cosine_similarity(aligned.alignment.alignment_projector[0](hidden), tokens, dim=-1).mean()
    assert found["own"][1] == pytest.approx(cosine.item(), abs=1e-4)
    assert {len(values) for values in found.values()} == {3}


@pytest.mark.parametrize(
    ("gains", "words"),
    [([0.2, 0.3, 0.25, 0.2], "moves"), ([-0.2, -0.3, -0.25, -0.2], "away"), ([0.2, -0.3, 0.25, -0.2], "No answer")],
)
def test_the_interval_decides_whether_there_is_an_answer(gains, words):
    frozen = {"own, centred": [0.1] * 4, "own": [0.5] * 4}
    trains = {"own, centred": [0.1 + gain for gain in gains], "own": [0.9] * 4}
    differences = compare({"LoRA trains": trains, "LoRA frozen": frozen}, ["a", "b", "c", "d"])
    assert words in answer(differences) and differences["own"]["mean"] == pytest.approx(0.4)


@pytest.fixture
def trained_with(processor, clouds, tmp_path, monkeypatch) -> list[list[str]]:
    """The options of every arm that `main` trains, by a stand-in; an arm of 99 steps is stopped by SIGTERM."""
    objects = tasks.annotated_objects(CLOUDS / "annotations.json", CLOUDS).first(4)
    asked = []

    def make_trainer(arguments):
        asked.append(arguments)
        aligned = aligned_model()

        def train_arm():
            if "--model.train=['lora']" in arguments:
                with torch.no_grad():
                    for parameter in aligned.model.model.language_model.parameters():
                        parameter.mul_(1.5)

        stop = SimpleNamespace(number=15 if "--training.max_steps=99" in arguments else 0)
        state = SimpleNamespace(global_step=3)
        return SimpleNamespace(model=aligned, train=train_arm, stop=stop, state=state), None, processor

    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(assets, "embedded_objects", lambda: tmp_path)
    monkeypatch.setattr(tasks, "embedded_objects", lambda folder, split: objects)
    monkeypatch.setattr(options, "parse", lambda arguments: arguments)
    monkeypatch.setattr(train, "make_trainer", make_trainer)
    monkeypatch.setattr(train, "describe", lambda arguments: {"arguments": arguments[1:3]})
    return asked


def test_a_stopped_arm_ends_the_command_without_a_result(trained_with, tmp_path):
    assert alignment_check.main(["--steps", "99", "--output", str(tmp_path / "out")]) == 128 + 15
    assert len(trained_with) == 1 and not (tmp_path / "out" / "alignment.json").exists()


def test_the_command_trains_both_arms_and_writes_the_answer(trained_with, tmp_path, capsys):
    assert alignment_check.main(["--steps", "7", "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert ["--model.train=['lora']" in part for part in trained_with] == [True, False]
    assert all("--training.max_steps=7" in part for part in trained_with) and written["steps"] == 7
    means = written["results"]
    assert means["LoRA frozen"] == means["before training"] != means["LoRA trains"]
    gain = means["LoRA trains"]["own, centred"] - means["LoRA frozen"]["own, centred"]
    assert written["differences"]["own, centred"]["mean"] == pytest.approx(gain, abs=1e-6)
    assert written["answer"] in capsys.readouterr().out and "over families, one seed" in written["answer"]
