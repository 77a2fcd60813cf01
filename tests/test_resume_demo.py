"""The demo itself, with the embedded model and objects: interrupted and resumed, it ends in the same bits."""

import os

import pytest
import torch
from safetensors.torch import load_file

from pointalign import stage_file, train

pytestmark = pytest.mark.skipif(
    not os.environ.get("POINTALIGN_LONG_TESTS"), reason="needs the embedded assets and minutes: make test-long"
)


def test_two_and_two_steps_are_four(tmp_path):
    options = ["--data.evaluate", "none", "--training.max_steps", "4", "--training.save_steps", "2"]
    options += ["--training.report_to", "none", "--data.views", "2"]
    options += ["--data.feature_cache", str(tmp_path / "features")]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(["demo", *options, "--training.output_dir", str(whole)]) == 0
    assert train.main(["demo", *options, "--training.output_dir", str(parts)]) == 0
    (parts / stage_file.STAGE_FILE).unlink()
    resume = ["--training.resume_from_checkpoint", str(parts / "checkpoint-2")]
    assert train.main(["demo", *options, "--training.output_dir", str(parts), *resume]) == 0
    expected, resumed = load_file(whole / stage_file.STAGE_FILE), load_file(parts / stage_file.STAGE_FILE)
    start = load_file(stage_file.find_stage("furniture-stage1"))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in start.items()), "the point branch is frozen"
    assert any(tensor.any() for name, tensor in expected.items() if ".lora_B." in name), "nothing was trained"
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
