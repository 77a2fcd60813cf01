"""The numbers of a training step: nothing that is not finite reaches a weight, and what went wrong can be repeated."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pointalign import storage
from pointalign.run_checkpoints import set_torch_random

LOGS = 4000
SPIKE_HISTORY = 20  # logs that a loss is compared with
SPIKE_DISTANCE = 8.0  # median absolute deviations above the median that make a spike
SPIKE_SHARE = 0.25  # and so much of the median: smooth curves have tiny deviations


class BatchWithObjects:
    """A collator whose batches also name their objects, under `object_ids`."""

    def __init__(self, collator: Callable[[list], dict[str, Any]]):
        self.collator = collator

    def __call__(self, samples: list) -> dict[str, Any]:
        return {**self.collator(samples), "object_ids": list(object_ids(samples))}


def object_ids(samples: Iterable[Any]) -> Iterable[str]:
    """Object ids of samples, or of batches of samples as a mixture has them."""
    for sample in samples:
        yield from object_ids(sample) if isinstance(sample, list) else sample.get("object_ids", ())


def all_finite(gradients: Sequence[Tensor], losses: Tensor) -> bool:
    """Whether gradients and losses are finite: one reduction on the device, read once by the host."""
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: the norm of all shards
    return bool(torch.isfinite(norm + losses.sum().to(norm.device)))


def write_failed_step(
    path: Path, model: nn.Module, batches: Sequence[dict[str, Any]], random: dict[str, Tensor], header: dict[str, Any]
) -> None:
    """Write what `repeat_step` needs: what trains, as it was before the step, its batches and the random state.

    Args:
        random: states before the first forward pass.
        header: anything as JSON, for the reader; `num_items`, the tokens of the global batch, is used.
    """
    tensors = {f"model.{name}": tensor for name, tensor in storage.training_state(model).items()}
    tensors |= {f"random.{name}": state for name, state in random.items()}
    numbers = []
    for place, batch in enumerate(batches):
        tensors |= {f"batch.{place}.{name}": value for name, value in batch.items() if isinstance(value, Tensor)}
        numbers.append({name: value for name, value in batch.items() if not isinstance(value, Tensor)})
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    storage.write_tensors(path, tensors, {"step": json.dumps(header | {"numbers": numbers})})


def repeat_step(model: nn.Module, path: Path) -> tuple[dict[str, float], list[str]]:
    """Run forward and backward of a step that `write_failed_step` wrote.

    Args:
        model: an `AlignedModel` built with the options of the run.

    Returns: The losses of the step, and the names of parameters whose gradient is not finite.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["step"])
    tensors = storage.load_tensors(path)
    device = next(model.parameters()).device
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith("model."):
                state[name.removeprefix("model.")].copy_(tensor)
    set_torch_random({name.removeprefix("random."): t for name, t in tensors.items() if name.startswith("random.")})
    model.train()
    model.zero_grad()
    losses: dict[str, float] = {}
    for place, numbers in enumerate(header["numbers"]):
        prefix = f"batch.{place}."
        batch = {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}
        outputs = model(**batch, **numbers, num_items_in_batch=torch.tensor(header["num_items"], device=device))
        outputs["loss"].backward()
        losses = {name: losses.get(name, 0.0) + value.item() for name, value in outputs.items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]


def thin_out(history: list[dict[str, Any]]) -> None:
    """Drop every second of the older half of a run's logs once there are `LOGS`: each checkpoint holds them all."""
    if len(history) >= LOGS:
        history[: LOGS // 2] = history[: LOGS // 2 : 2]


def spike(history: Sequence[dict[str, Any]], loss: float) -> str | None:
    """A line about a logged loss that stands far above the logs before it, or None.

    Args:
        history: earlier logs, of which those with `loss` count.
    """
    before = [entry["loss"] for entry in history if "loss" in entry][-SPIKE_HISTORY:]
    if len(before) < SPIKE_HISTORY // 2:
        return None
    median = statistics.median(before)
    deviation = statistics.median(abs(value - median) for value in before)
    if loss - median <= max(SPIKE_DISTANCE * deviation, SPIKE_SHARE * abs(median)):
        return None
    return f"loss spike: {loss:.4g}, the median of the {len(before)} logs before is {median:.4g}"


def memory_advice(args: Any, budget: object | None) -> str:
    """What to change when the device's memory did not suffice: the budget, and two options with values."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    advice = []
    if batch > 1:
        advice.append(
            f"--training.per_device_train_batch_size {batch // 2} --training.gradient_accumulation_steps "
            f"{accumulation * 2}: half the memory of a batch, the same training"
        )
    # the second name up to transformers 5.17
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(args, name))
    if not getattr(args, name):
        advice.append(f"--training.{name} true: activations are computed again, a third more time")
    advice += ["--model.quantization nf4: frozen weights in 4 bits", "--data.max_length 256: shorter samples"]
    lines = [str(budget)] if budget is not None else []
    return "\n".join([*lines, "the device has too little memory for a step; try", *(f"  {a}" for a in advice[:2])])
