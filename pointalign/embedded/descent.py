"""Gradient descent over the steps of stage 1, which goes on exactly where it was stopped."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pointalign import storage

WEIGHT_DECAY = 0.1
MUON_RATE = 4.0  # Muon's learning rate relative to AdamW's
RISE = 0.1  # share of the steps in which the learning rate rises; then it falls along a cosine
SAVE_EVERY = 500  # steps
LOG_EVERY = 50  # steps, over which losses are averaged


def descend(
    module: nn.Module,
    matrices: list[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    folder: Path | None = None,
) -> list[float]:
    """Minimise a loss over the parameters of a module, from step to step, resumable.

    Args:
        matrices: the parameters that Muon takes; AdamW takes the rest.
        name: of the progress bar and of the files in `folder`.

    Returns:
        The losses since the last stored step.
    """
    for_muon = {id(parameter) for parameter in matrices}
    parameters = list(module.parameters())
    others = [parameter for parameter in parameters if id(parameter) not in for_muon]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    ]
    if matrices:
        rate = MUON_RATE * learning_rate
        optimizers.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        )
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    path = folder / f"{name}.safetensors" if folder is not None else None
    first = load_progress(path, module, optimizers) if path is not None and path.exists() else 0
    losses: list[float] = []
    progress = tqdm(
        range(first, steps), desc=f"stage 1, {name}", unit="step", initial=first, total=steps, mininterval=5
    )
    for step in progress:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * one_cycle(step, steps)
            optimizer.zero_grad()
        torch.manual_seed(step)  # of the dropout
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if step % LOG_EVERY == LOG_EVERY - 1:
            progress.set_postfix(loss=f"{np.mean(losses[-LOG_EVERY:]):.3f}", refresh=False)
        if path is not None and (step + 1 == steps or (step + 1) % SAVE_EVERY == 0):
            save_progress(path, module, optimizers, step + 1)
    return losses


def one_cycle(step: int, steps: int) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine down to nearly nothing."""
    rise = max(1, round(RISE * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (steps + 1 - rise)))


def save_progress(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    storage.write_tensors(path, tensors, {"steps": str(steps)})


def load_progress(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load what `save_progress` wrote. Returns the number of steps done."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        steps = int(file.metadata()["steps"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    module.load_state_dict({name[7:]: tensor for name, tensor in tensors.items() if name.startswith("module.")})
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix := f"optimizer.{number}."):
                index, key = name.removeprefix(prefix).split(".")
                content["state"].setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(content)
    return steps
