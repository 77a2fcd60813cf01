"""What a training step needs against what the device has, before the first step.

Weights, gradients and optimizer states are counted. Activations are measured: one forward pass on the longest samples,
on the device, counting every tensor that autograd saves; they grow linearly with the tokens of a batch.
"""

import heapq
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # of accelerate
import torch
from torch import Tensor, nn

from pointalign.data.collator import IGNORED, token_counts
from pointalign.data.dataset import ConversationDataset
from pointalign.efficient.fused_parts import ROWS_AT_ONCE
from pointalign.efficient.quantization import is_4bit
from pointalign.models import PointAlignProcessor

if TYPE_CHECKING:
    from pointalign.options import Options, TrainingOptions

GB = 1e9
CUDA_CONTEXT = 0.6 * GB  # driver, cuBLAS workspaces, fragmentation: outside of what tensors need
MARGIN = 0.95  # share of the device that a batch may fill
CANDIDATES = 256  # samples whose tokens are counted to find the longest
BYTES_PER_TOKEN = 4  # of English text


def peak_resident_bytes(process: int | None = None) -> int | None:
    """The most memory a running process (default: this one) has held, in bytes; None where the system does not tell.

    On Linux this is read from /proc: getrusage also counts the memory of the process that started this one, and with
    a large parent that is all it shows.
    """
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        if process is not None:
            return None
    else:
        peak = re.search(r"VmHWM:\s*(\d+) kB", status)
        return int(peak[1]) * 1024 if peak else None  # a process that has ended has no memory left to show
    try:
        import resource  # absent on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Budget:
    """Bytes of one training step, by what they are for."""

    frozen: int  # weights that do not train, mostly the language model's
    trained: int  # weights that train, with gradients and two Adam moments
    activations: int  # saved by autograd for one batch
    logits: int  # fp32 logits of the supervised rows and their gradient, alive at the same time
    context: int  # of the device: driver and workspaces
    limit: int  # what the device has, or may use

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
        return replace(self, activations=round(self.activations * share), logits=round(self.logits * share))


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that autograd saves for the backward pass of `run()`, without parameters."""
    sizes: dict[int, int] = {}  # by address

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def device_bytes(device: torch.device, limit_gb: float | None = None) -> int:
    """The memory of a device, or `limit_gb` if that is less."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = psutil.virtual_memory().total
    return total if limit_gb is None else min(total, round(limit_gb * GB))


def budget(
    model: nn.Module, run: Callable[[], Tensor], supervised: int, device: torch.device, limit_gb: float | None = None
) -> Budget:
    """The memory of a step of `model` on the batch that `run` computes the loss of.

    Args:
        model: on `device`.
        run: returns the loss of the batch.
        supervised: rows of the batch that carry a label.
    """
    frozen = trained = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.requires_grad:
            trained += 4 * tensor.nbytes  # value, gradient, two moments
        else:
            frozen += tensor.nbytes
    for module in model.modules():
        if is_4bit(module):
            parts = module.weight.quant_state.as_dict().values()
            frozen += sum(part.nbytes for part in parts if isinstance(part, Tensor))
    if "supervised_cross_entropy" in vars(getattr(model, "model", model)):  # fused: a piece at a time
        supervised = min(supervised, ROWS_AT_ONCE)
    config: Any = model.config
    return Budget(
        frozen=frozen,
        trained=trained,
        activations=saved_bytes(run),
        logits=2 * 4 * supervised * config.text_config.vocab_size,
        context=round(CUDA_CONTEXT) if device.type == "cuda" else 0,
        limit=device_bytes(device, limit_gb),
    )


def fitting_batch(planned: Budget, batch_size: int) -> int:
    """The largest divisor of `batch_size` whose budget fits, where `planned` is the budget of `batch_size` samples.

    A divisor, so that gradient accumulation over `batch_size / result` micro-batches is the same training.

    Raises: ValueError: not even one sample fits.
    """
    for size in [divisor for divisor in range(batch_size, 0, -1) if batch_size % divisor == 0]:
        if planned.of(size / batch_size).total <= MARGIN * planned.limit:
            return size
    raise ValueError(
        f"not even one sample fits: {planned.of(1 / batch_size).total / GB:.2f} GB of {planned.limit / GB:.2f} GB; use "
        f"--model.quantization nf4, --training.activation_checkpointing true or a smaller --data.max_length\n{planned}"
    )


def cap_memory(limit_gb: float | None, device: torch.device) -> None:
    """Let the allocator take no more than a card of `limit_gb` would have; None lifts the cap.

    Raises: ValueError: the device is not CUDA, or smaller than that.
    """
    if device.type != "cuda":
        raise ValueError(f"training.memory_limit_gb={limit_gb} caps the CUDA allocator; this run is on {device.type}")
    total = device_bytes(device)
    limit = total if limit_gb is None else limit_gb * GB
    if limit > total:
        raise ValueError(f"training.memory_limit_gb={limit_gb}: the device has {total / GB:.1f} GB")
    index = torch.cuda.current_device() if device.index is None else device.index  # unlike its kin it needs an index
    torch.cuda.set_per_process_memory_fraction(limit / total, index)


def device_used_bytes(device: torch.device) -> int:
    """Bytes in use on the whole device now, context and other processes included; 0 without CUDA."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def longest_samples(
    dataset: ConversationDataset, processor: PointAlignProcessor, max_length: int, count: int
) -> list[int]:
    """Places of the `count` samples with the most tokens, the longest first.

    Tokens are counted for the samples whose entries are longest in the file; to tokenise all would take minutes in a
    large set.
    """
    conversations = dataset.conversations
    cloud = BYTES_PER_TOKEN * processor.num_query_tokens

    def estimate(place: int) -> int:
        return conversations.entry_bytes[place] + cloud * len(conversations.object_ids[place])

    candidates = heapq.nlargest(max(count, CANDIDATES), range(len(dataset)), key=estimate)
    tokens = token_counts(processor, [conversations[place] for place in candidates], max_length)
    order = sorted(range(len(candidates)), key=tokens.__getitem__, reverse=True)
    return [candidates[place] for place in order[:count]]


def largest_batch(
    datasets: Sequence[ConversationDataset], processor: PointAlignProcessor, options: "Options"
) -> list[dict]:
    """Samples that need as much memory as any batch: the longest two of a data set, or a batch of a mixture's longest.

    Args:
        datasets: the data set, or one for every part of the mixture.
    """
    max_length, batches = options.data.max_length, []
    sizes = [part.batch_size for part in options.data.mixture]
    for dataset, size in zip(datasets, sizes or [min(2, options.training.per_device_train_batch_size)], strict=True):
        places = longest_samples(dataset, processor, max_length, size)
        (tokens,) = token_counts(processor, [dataset.conversations[places[0]]], max_length)
        places = (places * size)[:size] if sizes else places  # a mixture repeats a set that is smaller than its batch
        batches.append((tokens * len(places), len(batches), places))
    _, part, places = max(batches)
    return [datasets[part][place] for place in places]


def plan_memory(
    aligned: nn.Module, samples: list[dict], collator: Callable[[list[dict]], dict[str, Any]], options: "Options"
) -> Budget:
    """The memory of a training step, measured on `samples`; `--training.auto_batch` fits the batch to it.

    Args:
        aligned: `AlignedModel`, in training form.
        samples: the longest there are, see `largest_batch`.

    Raises: ValueError: not even one sample fits.
    """
    training, device = options.training, options.training.device
    aligned.to(device)
    enable_checkpointing(aligned, training)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        inputs = collator(samples)
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        supervised = int((inputs["labels"] != IGNORED).sum())
        aligned.train()
        measured = budget(aligned, lambda: aligned(**inputs)["loss"], supervised, device, training.memory_limit_gb)
    size = training.per_device_train_batch_size
    if options.data.mixture:
        share = 1.0
    elif options.data.pack_tokens:
        share = options.data.pack_tokens / inputs["input_ids"].numel()
    else:
        share = size / len(samples)
    planned = measured.of(share)
    if training.auto_batch:
        fitting = least_over_processes(fitting_batch(planned, size), device)
        training.gradient_accumulation_steps *= size // fitting
        training.per_device_train_batch_size = fitting
        planned = planned.of(fitting / size)
    return planned


def enable_checkpointing(model: nn.Module, training: "TrainingOptions") -> None:
    """Activation checkpointing as the Trainer will enable it, under the names of this transformers."""
    names = ("activation_checkpointing", "gradient_checkpointing")  # the second up to transformers 5.17
    name = next(name for name in names if hasattr(training, name))
    if getattr(training, name):
        options = dict(getattr(training, f"{name}_kwargs") or {})
        placement = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
        getattr(model, f"{name}_enable")(options or None, **placement)


def least_over_processes(value: int, device: torch.device) -> int:
    """The least of all processes' values: cards may differ in memory, the number of micro-batches must not."""
    least = torch.tensor(value, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)
