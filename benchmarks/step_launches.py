"""Kernel launches of one training step of Phi-2's kind, counted on a CPU: what a GPU's host has to launch.

    python benchmarks/step_launches.py [--output benchmarks/results/step_launches.json]

An operator of PyTorch counts as one launch, a view as none. That is close to what CUDA launches: of these operators
only those over lists of tensors (`_foreach`, `_fused`) need several kernels, one per some hundred tensors. LoRA's
dropout is counted as its kernels, which a CPU computes by their reference. On CUDA liger-kernel's rotary embedding
replaces about thirty operators of a layer. The launches of a layer are the difference between models of three layers
and of two.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_step_rows import B3, D10, E, Row, make_batch, prepared, text_config, whole_config

from pointalign.efficient.fused_lora import AdapterGroup
from pointalign.storage import provenance
from pointalign_kernels import lora_dropout

LAYERS = 32  # of Phi-2
NO_KERNEL = frozenset(  # operators that return a view or an empty tensor
    "_local_scalar_dense _reshape_alias _unsafe_view alias as_strided detach diff empty empty_like empty_strided "
    "expand is_same_size lift_fresh new_empty new_empty_strided permute select slice split split_with_sizes squeeze t "
    "transpose unbind unfold unsafe_split unsqueeze view".split()
)
# Launches of each on CUDA, with the kernel that adds the slices of a sum.
DROPOUT_KERNELS = {"lora_dropout_down": 2, "lora_dropout_down_gradient": 2, "lora_dropout_input_gradient_": 1}
ROWS = (B3, D10, E)


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU, by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.in_kernel = False

    def kernel(self, name: str) -> Callable:
        """The function of that name in `lora_dropout`, counted as its launches, whatever its reference computes."""
        function = getattr(lora_dropout, name)

        def counted(*arguments: Any) -> Any:
            self.counts[name] += DROPOUT_KERNELS[name]
            self.in_kernel = True
            try:
                return function(*arguments)
            finally:
                self.in_kernel = False

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL and not self.in_kernel:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of_step(row: Row, layers: int) -> Counter[str]:
    """Operator -> launches of forward, backward and optimizer, in the second step (the first builds what is kept)."""
    config: Any = text_config()
    config.num_hidden_layers = layers
    batch = make_batch(whole_config(config), 1, seed=0)  # a sample: attention over the row is one operator
    with prepared(row, config, 8) as (aligned, loss):
        parameters = [parameter for parameter in aligned.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        for _ in range(2):
            launches = Launches()
            kernels = {name: launches.kernel(name) for name in DROPOUT_KERNELS}
            as_on_cuda = patch.object(AdapterGroup, "draws_from_counter", lambda group, rows: True)
            with as_on_cuda, patch.multiple(lora_dropout, **kernels), launches:
                loss(batch)
                optimizer.step()
            optimizer.zero_grad()
    return launches.counts


def launches_of_layer(row: Row) -> tuple[Counter[str], int]:
    """Launches of one decoder layer by operator, and those of the rest of the step."""
    two, three = launches_of_step(row, 2), launches_of_step(row, 3)
    layer = Counter({name: three[name] - two[name] for name in three if three[name] != two[name]})
    return layer, two.total() - 2 * layer.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_launches.json")
    output = parser.parse_args().output
    rows = []
    for row in ROWS:
        layer, rest = launches_of_layer(row)
        step = rest + LAYERS * layer.total()
        rows.append({"name": row.name, "layer": layer.total(), "step": step, "operators": dict(layer.most_common())})
        print(f"{row.name}: {layer.total()} launches a layer, {step} a step of {LAYERS} layers")
    content = {"layers": LAYERS, "rows": rows, "provenance": provenance(torch.device("cpu"))}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
