"""No number that is not finite reaches a weight, and a step that failed can be run again."""

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import Samples, make_model, make_trainer
from transformers import TrainerCallback

from pointalign import step_checks
from pointalign.efficient.memory import Budget
from pointalign.run_checkpoints import checkpoints


class SpoilGradient(TrainerCallback):
    """A gradient becomes `value` while the loss is finite, as that of a square root at 0 does."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(value, tmp_path, processor, clouds):
    model = make_model()
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, processor, clouds, model=model, **options)
    trainer.add_callback(SpoilGradient(3, value))
    with pytest.raises(FloatingPointError, match=r"at step 3 .*1 gradients are not finite; nothing was updated"):
        trainer.train()
    saved = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


class SpoiledIdentity(torch.autograd.Function):
    """Returns what it gets, with a gradient of NaN: the loss shows nothing."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def spoiled_model():
    """With dropout, and NaN for the gradients of the first decoder layer alone."""
    model = make_model(dropout=0.3)
    mlp = model.model.model.language_model.get_decoder().layers[0].mlp
    mlp.register_forward_hook(lambda module, inputs, output: SpoiledIdentity.apply(output))
    return model


def test_the_failed_step_names_its_objects_and_runs_again(tmp_path, processor, clouds):
    trainer = make_trainer(
        tmp_path, processor, clouds, model=spoiled_model(), gradient_accumulation_steps=2, max_steps=1
    )
    samples = Samples(clouds)
    trainer.train_dataset = [sample | {"object_ids": (f"object-{place}",)} for place, sample in enumerate(samples)]
    with pytest.raises(FloatingPointError, match=r"step 1 .*Objects of the step: object-\d, object-\d") as stopped:
        trainer.train()
    path = tmp_path / "failed-step-1-process-0.safetensors"
    assert str(path) in str(stopped.value)
    losses = trainer._step.losses.tolist()

    other = spoiled_model()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    torch.manual_seed(99)
    repeated, bad = step_checks.repeat_step(other, path)
    assert [repeated[name] for name in ("loss", "ntp_loss", "alignment_loss")] == pytest.approx(losses, rel=1e-6)
    assert bad and all(".layers.0." in name for name in bad)


def test_a_skipped_step_of_fp16_is_counted_and_a_loss_that_is_not_finite_stops(tmp_path, processor, clouds):
    trainer = make_trainer(tmp_path, processor, clouds, max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # as fp16 has on CUDA

    class OverflowAt(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer.scaler = trainer.accelerator.scaler
            next(p for p in trainer.model.parameters() if p.grad is not None).grad.view(-1)[0] = (
                float("inf") if state.global_step == 1 else 0.0
            )

    trainer.add_callback(OverflowAt())
    trainer.train()
    counts = [entry["skipped_steps"] for entry in trainer.state.log_history if "skipped_steps" in entry]
    assert counts == [0, 1, 1]
    trainer._step.losses = torch.tensor([float("nan"), 1.0, 1.0])
    trainer.accelerator.scaler.update(new_scale=0.5)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)


def test_a_loss_spike_is_reported():
    smooth = [{"loss": 2.0 + 0.01 * (step % 3)} for step in range(20)]
    assert step_checks.spike(smooth, 2.03) is None and step_checks.spike(smooth, 1.0) is None
    assert step_checks.spike(smooth, 2.4) is None, "a quarter of the median is noise"
    assert "loss spike: 6, the median of the 20 logs before is 2.01" in str(step_checks.spike(smooth, 6.0))
    assert step_checks.spike(smooth[:5], 6.0) is None, "too few logs"
    noisy = [{"loss": float(step % 7)} for step in range(20)]
    assert step_checks.spike(noisy, 9.0) is None


def test_the_logs_of_a_run_are_bounded():
    history = []
    for step in range(20_000):
        history.append({"step": step})
        step_checks.thin_out(history)
    steps = [entry["step"] for entry in history]
    assert len(history) < step_checks.LOGS and steps == sorted(steps)
    assert steps[0] == 0 and steps[-1_000:] == list(range(19_000, 20_000))


def test_a_device_out_of_memory_ends_with_the_budget_and_two_suggestions(tmp_path, processor, clouds, monkeypatch):
    trainer = make_trainer(tmp_path, processor, clouds, per_device_train_batch_size=4)
    trainer.budget = Budget(frozen=1, trained=1, activations=1, logits=1, context=1, limit=10**9)

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer, "training_step", exhausted)
    with pytest.raises(MemoryError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "memory of a training step" in message and "Tried to allocate 2.00 GiB" in message
    assert "--training.per_device_train_batch_size 2 --training.gradient_accumulation_steps 2" in message
    assert "_checkpointing true" in message and "nf4" not in message
    trainer.args.per_device_train_batch_size = 1
    assert "nf4" in step_checks.memory_advice(trainer.args, None)
