"""A run ends where its held-out loss no longer falls, with its best weights; a resumed run ends there too."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_held_out_losses import HELD_OUT, PARTS, arguments, language_model  # noqa: F401

from pointalign import train
from pointalign.early_stopping import EarlyStopping, standing
from pointalign.held_out_losses import HeldOutLosses
from pointalign.interruptions import StopOnSignal
from pointalign.options import parse
from pointalign.run_checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures("random_point_branch")
EVERY_STEP = ["--training.logging_steps", "1", "--training.save_steps", "1", "--training.save_total_limit", "99",
              "--training.max_steps", "6", *HELD_OUT]  # fmt: skip
PATIENT = ["--training.early_stopping_patience", "2"]
LOSSES = [3.0, 2.0, 1.0, 1.5, 1.0, 0.5, 0.4]  # by step; lowest at step 2 until patience ends at step 4


@pytest.fixture
def scripted(monkeypatch):
    """Held-out losses as LOSSES says, of a part that falls and a part that does not."""

    def measure(self):
        loss = LOSSES[self.trainer.state.global_step]
        self.trainer.log({"held_out/a": 2 * loss, "held_out/b": 0.0, "held_out/alignment_loss": -loss})

    monkeypatch.setattr(HeldOutLosses, "measure", measure)


def equal_to(stage, checkpoint) -> bool:
    """Whether a stage file has the trained weights of a checkpoint, which are fp32 and named under `model.`."""
    weights, trained = load_file(stage), load_file(checkpoint)
    names = [name for name in weights if f"model.{name}" in trained]
    assert any("lora_A" in name for name in names)
    return all(torch.equal(weights[name], trained[f"model.{name}"].to(weights[name].dtype)) for name in names)


def test_it_stops_and_exports_the_best_weights_and_a_resumed_run_does_the_same(
    tmp_path,
    arguments,  # noqa: F811
    scripted,
    capsys,
):
    assert train.main([*arguments, *EVERY_STEP, *PATIENT]) == 0
    run = tmp_path / "run"
    said = "stopped early at step 4, 2 logs after the lowest held-out loss: the weights of step 2 are used"
    assert said in capsys.readouterr().out
    assert not (run / "checkpoint-5").exists()
    assert equal_to(run / "stage.safetensors", run / "checkpoint-2" / "model.safetensors")
    assert not equal_to(run / "stage.safetensors", run / "checkpoint-4" / "model.safetensors")
    description = json.loads((run / "stage.json").read_text())
    assert (description["steps"], description["best_step"], description["held_out_loss"]) == (4, 2, 1.0)

    expected = load_file(run / "stage.safetensors")
    for step in (3, 4):  # on the way, and of a run that has stopped, which takes no further step
        (run / "stage.safetensors").unlink()
        resumed = ["--training.resume_from_checkpoint", str(run / f"checkpoint-{step}")]
        assert train.main([*arguments, *EVERY_STEP, *PATIENT, *resumed]) == 0
        assert said in capsys.readouterr().out
        again = load_file(run / "stage.safetensors")
        assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert not (run / "checkpoint-5").exists()

    more = ["--training.early_stopping_patience", "3", "--training.resume_from_checkpoint", str(run / "checkpoint-4")]
    assert train.main([*arguments, *EVERY_STEP, *more]) == 0
    output = capsys.readouterr().out
    assert "early_stopping_patience was 2, is 3" in output
    assert "ended at step 6, 0 logs after the lowest held-out loss: the weights of step 6 are used" in output


def test_a_checkpoint_without_best_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"went without training.early_stopping_patience; go on without it"):
        EarlyStopping(SimpleNamespace(), StopOnSignal(), patience=2).load(tmp_path)  # type: ignore[arg-type]


def test_a_model_that_learns_nothing_stops_by_its_measured_losses(tmp_path, arguments, capsys):  # noqa: F811
    assert train.main([*arguments, *EVERY_STEP, *PATIENT, "--training.learning_rate", "0"]) == 0
    assert "stopped early at step 2, 2 logs after the lowest held-out loss: the weights of step 0" in (
        capsys.readouterr().out
    )


def test_the_alignment_loss_is_not_part_of_the_held_out_loss():
    entries = [{"step": step, **{f"held_out/{part}": loss for part in PARTS}} for step, loss in enumerate([2.0, 3.0])]
    entries[1]["held_out/alignment_loss"] = -9.0
    assert standing([*entries, {"step": 1, "loss": 0.1}]) == (0, 2.0, 1)
    assert standing([{"step": 0, "held_out/all": float("nan")}, {"step": 5, "held_out/all": 1.0}]) == (5, 1.0, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.annotations", "mine.json", "--data.clouds", "clouds"], "data.validation FILE"),
        (["--data.fold", "1", "--data.evaluate", "none"], "data.validation FILE"),
        (["--training.early_stopping_patience", "-1"], "expected a number of logs"),
    ],
)
def test_it_needs_held_out_conversations(more, message, capsys):
    with pytest.raises(SystemExit):
        parse(["demo", *PATIENT, *more])
    assert message in capsys.readouterr().err


def test_several_processes_are_refused(monkeypatch):
    options = parse(["demo", *PATIENT])
    monkeypatch.setattr(type(options.training), "world_size", 2)
    with pytest.raises(ValueError, match="needs a run of one process"):
        options.check()
