"""The adapter of PointLLM's checkpoints, with a package of that name that holds a tiny random model."""

import os
import sys

import made_adapters
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pointalign.audit import adapter, pointllm_adapter


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("pointllm")
    made_adapters.write_pointllm(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=264,
        bos_token_id=None, eos_token_id=256, pad_token_id=257, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def loaded(checkpoint, monkeypatch):
    monkeypatch.syspath_prepend(str(checkpoint))
    monkeypatch.delenv("POINTLLM_PYTHON", raising=False)
    yield pointllm_adapter.load(str(checkpoint / "model"))
    for name in [name for name in sys.modules if name.split(".")[0] == "pointllm"]:
        del sys.modules[name]


QUESTIONS = ["What is this?", "Is it taller or wider?", "What is this?"]
OPTIONS = [["A chair.", "A lamp."], [], ["Yes.", "No."]]


def test_a_checkpoint_is_asked_with_and_without_clouds(loaded, clouds):
    pointllm = adapter.find("pointllm")
    replies = pointllm.reply(loaded, QUESTIONS, [clouds[0], clouds[1], None], OPTIONS)
    assert len({reply["text"] for reply in replies}) == 3 and replies[1]["scores"] is None
    prompt = loaded.text(QUESTIONS[0], True)
    assert prompt == "A chat. USER: <point_start>" + 3 * "<point_patch>" + "<point_end>\nWhat is this? ASSISTANT:"
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    points = torch.from_numpy(pointllm_adapter.as_pointllm(clouds[0]))[None]
    candidate = loaded.tokenizer("A chair.", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = loaded.model(torch.cat([ids, candidate], dim=1), point_clouds=points).logits[0]
        first = loaded.model(ids, point_clouds=points).logits[0, -1].log_softmax(-1)
    expected = sum(
        logits[ids.shape[1] - 1 + place].log_softmax(-1)[token].item() for place, token in enumerate(candidate[0])
    )
    assert replies[0]["scores"][0] == pytest.approx(expected, rel=1e-4)
    assert 0 < replies[0]["probability"] <= first.max().exp()


def test_a_cloud_has_z_up_and_lies_in_the_unit_sphere(clouds):
    turned = pointllm_adapter.as_pointllm(clouds[0])
    assert np.linalg.norm(turned[:, :3], axis=1).max() == pytest.approx(1, abs=1e-5)
    sides, before = np.ptp(turned[:, :3], axis=0), np.ptp(clouds[0][:, :3], axis=0)
    assert sides[2] / sides[0] == pytest.approx(before[1] / before[0], rel=1e-4), "the height is along z"
    assert np.linalg.det(np.linalg.lstsq(clouds[0][:, :3] - clouds[0][:, :3].mean(0), turned[:, :3], rcond=None)[0]) > 0
    assert np.array_equal(turned[:, 3:], clouds[0][:, 3:])
    assert not pointllm_adapter.as_pointllm(np.zeros((9, 6))).any()


def test_a_worker_in_another_interpreter_gives_the_same(loaded, checkpoint, clouds, monkeypatch):
    monkeypatch.setenv("POINTLLM_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", f"{checkpoint}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    worker = pointllm_adapter.load(str(checkpoint / "model"))
    shown = [clouds[0], clouds[1], None]
    expected = adapter.find("pointllm").reply(loaded, QUESTIONS, shown, OPTIONS)
    found = adapter.find("pointllm").reply(worker, QUESTIONS, shown, OPTIONS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["text"] == theirs["text"]
        assert ours["probability"] == pytest.approx(theirs["probability"], rel=1e-4)
        assert ours["scores"] == (theirs["scores"] and pytest.approx(theirs["scores"], rel=1e-4))
    worker.close()
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(OSError, match="worker ended"):
        pointllm_adapter.load(str(checkpoint / "model"))
