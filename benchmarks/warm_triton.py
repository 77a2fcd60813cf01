"""Fill Triton's cache for a GPU that is not here: compile this project's kernels that the timed stages launch.

Those are the kernels of the alignment loss, also with the tiles of the probe, of LoRA's dropout in the training steps
and of the mini-PointNet in bf16.

    PYTHONPATH=.:kernels TRITON_CACHE_DIR=FOLDER python benchmarks/warm_triton.py [--capability 90]

The versions of torch, triton and Python must be those of the GPU box, and the sources those that travel: all enter the
keys of the cache. The cache holds absolute paths, so it must lie in the same FOLDER there.
"""

import argparse
import contextlib
import time
from unittest.mock import patch

import torch
import triton
from alignment_candidates import EARLIER, under
from alignment_tma import by_tma
from compile_folded_pointnet import CONFIG, paper_weights
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pointalign_kernels import (
    alignment,
    alignment_triton,
    folded_pointnet_triton,
    lora_dropout,
    lora_dropout_triton,
)

HIDDEN, FEATURES = 2560, 768
ROWS = (128, 256, 512, 1024)
MULTIPROCESSORS = 132  # of an H100 or H200: the choice of a tile depends on it
# Rank, inputs and adapters of the groups of LoRA layers in the steps of Phi-2 and of the 8B model.
LORA = (
    *((64, HIDDEN, adapters) for adapters in (1, 3, 4)),
    (64, 4 * HIDDEN, 1),
    *((16, 4096, adapters) for adapters in (1, 2, 3)),
    (16, 14336, 1),
)
LORA_ROWS = (128, 2**14)  # tokens: sums over columns in slices, and at once
LORA_DROPOUT = 0.05


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    utils = None

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int = 90) -> set[tuple]:
    """From now on in this process a launch compiles for that capability and does not run, whatever its tensors are on.

    Returns:
        The keys of what was compiled, growing with every new kernel.
    """
    compiled: set[tuple] = set()
    compile_kernel, run = JITFunction._do_compile, JITFunction.run

    def compile_once(self, key, signature, device, constexprs, options, attrs, warmup):
        if (self.__name__, key) not in compiled:
            compiled.add((self.__name__, key))
            return compile_kernel(self, key, signature, device, constexprs, options, attrs, True)
        return None

    JITFunction._do_compile = compile_once
    JITFunction.run = lambda self, *arguments, grid, warmup, **options: run(
        self, *arguments, grid=grid, warmup=True, **options
    )
    driver.set_active(AbsentGpu(capability))
    for module in (alignment_triton, folded_pointnet_triton):
        module._capability = lambda device: capability
    for module in (alignment_triton, lora_dropout_triton):
        module._multiprocessors = lambda device: MULTIPROCESSORS
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    return compiled


def launch_step(rows: int, parameters: torch.dtype) -> None:
    """Forward and backward of the alignment loss as training launches them, `rows` point tokens in bf16."""
    width = (HIDDEN + FEATURES) // 2
    shapes = ((width, HIDDEN), (width, width), (FEATURES, width))
    weights = [torch.empty(1, *shape, dtype=parameters) for shape in shapes]
    biases = [torch.empty(1, shape[0], dtype=parameters) for shape in shapes]
    hidden = torch.empty(1, rows, HIDDEN, dtype=torch.bfloat16)
    target = torch.empty(rows, FEATURES, dtype=torch.bfloat16)
    _, dy, pre, act, *copies = alignment.alignment_forward(hidden, target, weights, biases, torch.bfloat16)
    alignment.alignment_backward(torch.ones(1), hidden, dy, pre, act, weights, biases, *copies, True, True)


def launch_lora_dropout(rows: int, rank: int, inputs: int, adapters: int) -> None:
    """Forward and backward of the dropout of LoRA layers that share their inputs, `rows` tokens in bf16."""
    tensors = {"dtype": torch.bfloat16, "device": "meta"}
    x, down, low = (
        torch.empty(*shape, **tensors) for shape in ((rows, inputs), (adapters * rank, inputs), (rows, adapters * rank))
    )
    seed = lora_dropout.draw_seed(x.device)
    with patch.object(lora_dropout, "fused_available", lambda device_type: True):
        lora_dropout.lora_dropout_down(x, down, seed, adapters, LORA_DROPOUT, 0.25)
        lora_dropout.lora_dropout_down_gradient(x, low, seed, adapters, LORA_DROPOUT, torch.empty_like(down))
        lora_dropout.lora_dropout_input_gradient_(x, low, down, seed, adapters, LORA_DROPOUT)


def launch_lora_dropouts() -> None:
    for sizes in LORA:
        for rows in LORA_ROWS:
            launch_lora_dropout(rows, *sizes)


def launch_pointnet() -> None:
    """The mini-PointNet of the paper's encoder over one cloud in bf16."""
    weights = [tensor.contiguous() for tensor in paper_weights().tensors()]
    groups = torch.empty(1, CONFIG.num_groups, CONFIG.group_size, CONFIG.in_channels, dtype=torch.bfloat16)
    folded_pointnet_triton.launch(groups, weights, groups.new_empty(*groups.shape[:2], len(weights[-1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability without its dot")
    capability = parser.parse_args().capability
    start = time.monotonic()
    compiled = compile_only(capability)
    ways = [contextlib.nullcontext]
    if capability == 90:
        ways += [lambda: under(EARLIER[90]), by_tma]
    for way in ways:
        for rows in ROWS:
            for parameters in (torch.float32, torch.bfloat16):
                with way():
                    launch_step(rows, parameters)
    launch_lora_dropouts()
    launch_pointnet()
    import gpu_probe  # it launches other tiles as well

    gpu_probe.launches()
    seconds = time.monotonic() - start
    print(f"{len(compiled)} kernels for capability {capability} by triton {triton.__version__} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
