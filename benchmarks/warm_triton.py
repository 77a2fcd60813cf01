"""Fill Triton's cache for a GPU that is not here: compile what the alignment benchmarks and the probe launch.

    PYTHONPATH=.:kernels TRITON_CACHE_DIR=FOLDER python benchmarks/warm_triton.py [--capability 90]

The versions of torch, triton and Python must be those of the GPU box, and the sources those that travel: all enter the
keys of the cache. The cache holds absolute paths, so it must lie in the same FOLDER there.
"""

import argparse
import contextlib
import time

import torch
import triton
from alignment_candidates import EARLIER, under
from alignment_tma import by_tma
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pointalign_kernels import alignment, alignment_triton

HIDDEN, FEATURES = 2560, 768
ROWS = (128, 256, 512, 1024)
MULTIPROCESSORS = 132  # of an H100 or H200: the choice of a tile depends on it


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
    alignment_triton._capability = lambda device: capability
    alignment_triton._multiprocessors = lambda device: MULTIPROCESSORS
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
    import gpu_probe  # it launches other tiles as well

    gpu_probe.launches()
    seconds = time.monotonic() - start
    print(f"{len(compiled)} kernels for capability {capability} by triton {triton.__version__} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
