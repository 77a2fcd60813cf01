"""What a training step needs against what the device has, before the first step is taken.

Weights, gradients and optimizer states are counted. Activations are measured: one forward pass of one batch, on the
device, with every tensor counted that autograd keeps; they grow linearly with the tokens of packed batches.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pointalign.options import Options

GB = 1e9
CUDA_CONTEXT = 0.6 * GB  # driver, cuBLAS workspaces, fragmentation: outside of what tensors need
MARGIN = 0.95  # share of the device that a batch may fill


@dataclass
class Budget:
    """Bytes of one training step, by what they are for.

    Attributes:
        frozen: weights that do not train, the language model's own mostly.
        trained: weights that train, with gradients and two Adam moments.
        activations: kept by autograd for one batch.
        logits: fp32 logits of the supervised rows and their gradient, alive at the same time.
        context: of the device, not of tensors.
        limit: what the device has, or may use.
    """

    frozen: int
    trained: int
    activations: int
    logits: int
    context: int
    limit: int

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.activations + self.logits + self.context

    def __str__(self) -> str:
        parts = {
            "frozen weights": self.frozen,
            "trained weights, gradients, optimizer": self.trained,
            "activations of a batch": self.activations,
            "logits": self.logits,
            "device context": self.context,
        }
        lines = [f"  {name:38} {value / GB:8.3f} GB" for name, value in parts.items()]
        verdict = "fits" if self.total <= self.limit else "DOES NOT FIT"
        lines.append(f"  {'together (estimate)':38} {self.total / GB:8.3f} GB of {self.limit / GB:.1f} GB: {verdict}")
        return "memory of a training step\n" + "\n".join(lines)

    def of(self, share: float) -> "Budget":
        """The budget of a batch `share` times as large."""
        return Budget(
            self.frozen,
            self.trained,
            round(self.activations * share),
            round(self.logits * share),
            self.context,
            self.limit,
        )


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass of `run()`, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(kept.values())


def device_bytes(device: torch.device, limit_gb: float | None = None) -> int:
    """What a device has in all, or `limit_gb` if that is less."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total if limit_gb is None else min(total, round(limit_gb * GB))


def budget(
    model: nn.Module, run: Callable[[], Tensor], supervised: int, device: torch.device, limit_gb: float | None = None
) -> Budget:
    """The memory of a step of `model` on the batch that `run` computes the loss of.

    Args:
        model: in its place on `device`.
        supervised: rows of the batch that carry a label.
    """
    frozen = trained = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        size = tensor.numel() * tensor.element_size()
        frozen += 0 if tensor.requires_grad else size
        trained += 4 * size if tensor.requires_grad else 0  # value, gradient, two moments
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            frozen += sum(
                one.numel() * one.element_size() for one in state.as_dict().values() if isinstance(one, Tensor)
            )
    config: Any = model.config
    vocabulary = config.text_config.vocab_size
    rows = supervised
    if "supervised_cross_entropy" in vars(getattr(model, "model", model)):  # fused: a piece at a time
        from pointalign.efficient.fused_parts import ROWS_AT_ONCE

        rows = min(supervised, ROWS_AT_ONCE)
    return Budget(
        frozen=frozen,
        trained=trained,
        activations=saved_bytes(run),
        logits=2 * 4 * rows * vocabulary,
        context=round(CUDA_CONTEXT) if device.type == "cuda" else 0,
        limit=device_bytes(device, limit_gb),
    )


def fitting_batch(found: Budget, batch_size: int) -> int:
    """The largest divisor of `batch_size` whose budget fits, `found` being that of a whole batch.

    A divisor, so that gradient accumulation over `batch_size / result` micro-batches is the same training.

    Raises:
        ValueError: not even one sample fits.
    """
    for size in [one for one in range(batch_size, 0, -1) if batch_size % one == 0]:
        if found.of(size / batch_size).total <= MARGIN * found.limit:
            return size
    raise ValueError(
        f"not even one sample fits: {found.of(1 / batch_size).total / GB:.2f} GB of {found.limit / GB:.2f} GB; use "
        f"--model.quantization nf4, --training.gradient_checkpointing true or a smaller --data.max_length\n{found}"
    )


def cap_memory(limit_gb: float, device: torch.device) -> None:
    """Let the allocator take no more than a card of `limit_gb` would have.

    Raises:
        ValueError: the device is not CUDA, or smaller than that.
    """
    if device.type != "cuda":
        raise ValueError(f"training.memory_limit_gb={limit_gb} caps the CUDA allocator; this run is on {device.type}")
    total = device_bytes(device)
    if limit_gb * GB > total:
        raise ValueError(f"training.memory_limit_gb={limit_gb}: the device has {total / GB:.1f} GB")
    torch.cuda.set_per_process_memory_fraction(limit_gb * GB / total, device)


def device_used_bytes(device: torch.device) -> int:
    """Bytes in use on the whole device now, context and other processes included; 0 without CUDA."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def plan_memory(aligned: Any, dataset: Any, collator: Any, options: "Options") -> Budget:
    """The memory of a training step, measured on two samples; `--training.auto_batch` fits the batch to it.

    Args:
        aligned: `AlignedModel`, in training form.

    Raises:
        ValueError: not even one sample fits, or the options contradict one another.
    """
    training, device = options.training, options.training.device
    if training.auto_batch and options.data.mixture:
        raise ValueError("training.auto_batch cannot split a batch of data.mixture: lower its batch_size")
    if training.auto_batch and options.data.pack_tokens:
        raise ValueError("training.auto_batch counts samples, data.pack_tokens tokens: choose one")
    aligned.to(device)
    if training.gradient_checkpointing:
        aligned.gradient_checkpointing_enable(gradient_checkpointing_kwargs=training.gradient_checkpointing_kwargs)
    size = training.per_device_train_batch_size
    probe = min(2, size, len(dataset))
    with torch.random.fork_rng():
        batch = collator([dataset[index] for index in range(probe)])
        batch = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in batch.items()}
        supervised = int((batch["labels"] != -100).sum())
        aligned.train()
        found = budget(aligned, lambda: aligned(**batch)["loss"], supervised, device, training.memory_limit_gb)
    share = options.data.pack_tokens / batch["input_ids"].numel() if options.data.pack_tokens else size / probe
    whole = found.of(share)
    if training.auto_batch:
        fitting = fitting_batch(whole, size)
        training.gradient_accumulation_steps *= size // fitting
        training.per_device_train_batch_size = fitting
        whole = whole.of(fitting / size)
    return whole
