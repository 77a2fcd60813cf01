"""The training step: how losses are normalised, what learns, and that nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assistant, tiny_model, user
from torch.utils.data import Dataset
from transformers import TrainerCallback

from pointalign.alignment import AlignmentConfig
from pointalign.data.collator import ConversationCollator
from pointalign.options import ModelOptions, TrainingOptions
from pointalign.stages import add_adapters, set_trainable
from pointalign.trainer import AlignedModel, PointAlignTrainer, checkpoints

ROOT = Path(__file__).parents[1]


class Samples(Dataset):
    """Eight conversations with 1, 2 or no clouds and answers of unequal length."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __init__(self, clouds, count: int = 8):
        self.items = []
        for i in range(count):
            given = [clouds[(i + j) % len(clouds)] for j in range((1, 2, 0)[i % 3])]
            self.items.append([user(f"What is object {i}?", *given), assistant("It is " + "very " * i + "nice.")])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        draw = (self.epoch, index)
        return {"messages": self.items[index], "conversation_type": "simple_description", "draw": draw}


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            control.should_training_stop = True


def make_model(weight: float = 0.5, dropout: float = 0.0, train=("lora",), impl: str = "reference", **alignment):
    model = tiny_model()
    torch.manual_seed(1)
    add_adapters(model, ModelOptions(lora_rank=4, lora_alpha=8, lora_dropout=dropout))
    with torch.no_grad():  # B starts at zero, which would stop every gradient to A
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    set_trainable(model, list(train))
    return AlignedModel(model, AlignmentConfig(weight=weight, **alignment), impl)


def make_trainer(folder, processor, clouds, model=None, augmentation: bool = False, **options) -> PointAlignTrainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }
    return PointAlignTrainer(
        model=model or make_model(),
        args=TrainingOptions(**(defaults | options)),
        train_dataset=Samples(clouds),
        data_collator=ConversationCollator(processor, 512, augmentation),
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_update(folder, processor, clouds, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    """The gradients of the first update over the same eight samples in order."""
    trainer = make_trainer(
        folder,
        processor,
        clouds,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
    )
    found = {}
    step = torch.optim.AdamW.step

    def keep(optimizer, *args, **kwargs):
        found.update(gradients(trainer.model))
        return step(optimizer, *args, **kwargs)

    torch.optim.AdamW.step = keep
    try:
        trainer.train()
    finally:
        torch.optim.AdamW.step = step
    found["logged"] = torch.tensor([trainer.state.log_history[0][key] for key in ("ntp_loss", "alignment_loss", "loss")])
    return found


def assert_same(one: dict, other: dict, tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_accumulation_does_not_change_the_update(tmp_path, processor, clouds):
    whole = one_update(tmp_path / "a", processor, clouds, batch=8, accumulation=1)
    parts = one_update(tmp_path / "b", processor, clouds, batch=2, accumulation=4)
    assert whole["logged"][1] > 0.1
    assert_same(whole, parts)


TWO_RANKS = """
import os, sys, torch
sys.path.insert(0, {tests!r})
import conftest, test_trainer
tokenizer = conftest.tokenizer.__wrapped__()
processor = conftest.processor.__wrapped__(tokenizer)
clouds = conftest.clouds.__wrapped__()
torch.set_num_threads(1)
found = test_trainer.one_update({folder!r}, processor, clouds, batch=4, accumulation=1)
if int(os.environ["RANK"]) == 0:
    torch.save(found, {out!r})
"""


def test_two_ranks_make_the_update_of_one(tmp_path, processor, clouds):
    whole = one_update(tmp_path / "a", processor, clouds, batch=8, accumulation=1)
    script, out = tmp_path / "ranks.py", tmp_path / "found.pt"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "b"), out=str(out)))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29731", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = {name.replace("module.", ""): value for name, value in torch.load(out, weights_only=True).items()}
    # The sampler deals samples out alternately, so each rank holds other samples than a micro-batch would: the sum is one.
    assert_same(whole, ranks)


def test_alignment_of_zero_weight_equals_no_alignment(tmp_path, processor, clouds):
    losses = []
    for weight in (0.0, 1e-30):  # the second attaches tap and projector but adds nothing a float can hold
        model = make_model(weight=weight, dropout=0.1)
        trainer = make_trainer(tmp_path / str(weight), processor, clouds, model=model, max_steps=3)
        trainer.train()
        losses.append([entry["ntp_loss"] for entry in trainer.state.log_history if "ntp_loss" in entry])
    assert losses[0] == losses[1]


def test_gradients_reach_lora_before_the_tapped_layer_and_nothing_frozen(processor, clouds):
    model = make_model(weight=1.0, layer=[2])
    batch = ConversationCollator(processor, 512)([Samples(clouds)[0], Samples(clouds)[1]])
    with model.tap.capture(batch["point_mask"]) as hidden:
        features = model.model(**batch).point_features
    loss = model.alignment(hidden, model.target(features, hidden))
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("layers.0." in name and "lora_A" in name for name in reached)
    assert any("layers.1." in name and "lora_B" in name for name in reached)
    assert not any(f"layers.{later}." in name for name in reached for later in (2, 3))
    assert not any(part in name for name in reached for part in ("qformer", "point_", "query", "modality"))
    assert any("alignment_projector" in name for name in reached)


def test_frozen_parts_do_not_move(tmp_path, processor, clouds):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(tmp_path, processor, clouds, model=model, max_steps=3).train()
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (".lora_" in name or name.startswith("alignment.")), name


@pytest.mark.parametrize("augmentation", [False, True])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, processor, clouds, augmentation):
    def run(folder, stop_at=None, resume=None):
        torch.manual_seed(5)
        model = make_model(dropout=0.1, train=("lora", "point_encoder", "qformer"))
        trainer = make_trainer(
            folder,
            processor,
            clouds,
            model=model,
            augmentation=augmentation,
            max_steps=10,  # two and a half epochs, stopped and resumed in the second
            save_strategy="steps",
            save_steps=5,
            save_total_limit=None,
            lr_scheduler_type="cosine",
        )
        if stop_at:
            trainer.add_callback(StopAfter(stop_at))
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in model.state_dict().items()}

    whole = run(tmp_path / "whole")
    run(tmp_path / "halves", stop_at=5)
    resumed = run(tmp_path / "halves", resume=str(checkpoints(tmp_path / "halves")[-1]))
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_checkpoints_are_safetensors_and_json_only(tmp_path, processor, clouds):
    make_trainer(tmp_path, processor, clouds, save_strategy="steps", save_steps=1).train()
    assert [one.name for one in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    for folder in checkpoints(tmp_path):
        assert {one.suffix for one in folder.iterdir()} == {".safetensors", ".json"}
        json.loads((folder / "optimizer.json").read_text())
    assert not (tmp_path / ".incomplete").exists()


def test_full_disk_keeps_the_last_checkpoint_and_names_it(tmp_path, processor, clouds, monkeypatch):
    from pointalign import checkpointing

    trainer = make_trainer(tmp_path, processor, clouds, save_strategy="steps", save_steps=1, max_steps=3)
    write = checkpointing.write_tensors

    def full(path, tensors, metadata=None):
        if trainer.state.global_step == 2:
            raise OSError(28, "No space left on device")
        write(path, tensors, metadata)

    monkeypatch.setattr(checkpointing, "write_tensors", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written.*No space left.*checkpoint-1"):
        trainer.train()
    assert [one.name for one in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / ".incomplete").exists()


def test_ctrl_c_saves_and_stops(tmp_path, processor, clouds):
    trainer = make_trainer(tmp_path, processor, clouds, save_strategy="steps", save_steps=100, max_steps=50)

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), 2)

    trainer.add_callback(Press())
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.stop.interrupted
    assert [one.name for one in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_non_finite_loss_stops_before_the_update(tmp_path, processor, clouds):
    model = make_model()
    trainer = make_trainer(tmp_path, processor, clouds, model=model)
    with torch.no_grad():
        model.alignment.alignment_projector[0].projector[4].bias.fill_(float("nan"))
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" in name}
    with pytest.raises(FloatingPointError, match="alignment nan"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("target", ["qformer", "encoder", "llm:4"])
def test_every_target_trains(tmp_path, processor, clouds, target):
    model = make_model(weight=1.0, layer=[1, 3], target=target, layer_weights="learned")
    trainer = make_trainer(tmp_path, processor, clouds, model=model, max_steps=12, per_device_train_batch_size=8)
    trainer.train()
    losses = [entry["alignment_loss"] for entry in trainer.state.log_history if "alignment_loss" in entry]
    assert np.mean(losses[-2:]) < losses[0] - 0.05


def test_activation_checkpointing_changes_nothing(tmp_path, processor, clouds):
    found = []
    for checkpointing in (False, True):
        model = make_model(weight=1.0)
        batch = ConversationCollator(processor, 512)([Samples(clouds)[i] for i in range(3)])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(**batch)["loss"].backward()
        found.append(gradients(model))
    assert_same(*found, tolerance=1e-7)
