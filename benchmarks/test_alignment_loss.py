"""The alignment loss, forward and backward: reference, torch.compile, the fused kernels launched and as a CUDA graph.

Every row starts from the same leaves and ends with the gradients of all of them in the leaves' dtypes, so casts lie
inside the timed region: "autocast" has fp32 parameters and bf16 hidden states under bf16 autocast, as the trainer has;
"bf16" has everything in bf16. "explicit" is benchmarks/explicit_alignment.py. "-graph" captures the whole pass once per
set, for torch.compile too: its own reduce-overhead mode would copy weights that are not module parameters. "earlier"
takes the tiles of benchmarks/alignment_candidates.py, "tma" the launches of benchmarks/alignment_tma.py: one call
measures them beside the library's table. Inputs rotate over several sets that together exceed the L2 cache.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from explicit_alignment import ExplicitAlignment
from torch import Tensor

from pointalign_kernels import alignment_loss, fused_available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (128, 256, 512, 1024) if DEVICE == "cuda" else (128, 512)
HIDDEN = (2048, 2560)
FEATURES = 768
PRECISIONS = ("autocast", "bf16")
IMPLEMENTATIONS = ("reference", "compile")
IMPLEMENTATIONS += ("compile-graph",) if DEVICE == "cuda" else ("explicit",)
if fused_available(DEVICE):
    IMPLEMENTATIONS += ("fused", "fused-graph") if DEVICE == "cuda" else ("fused",)
if fused_available(DEVICE) and DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0):
    IMPLEMENTATIONS += ("fused-earlier-graph", "fused-tma-graph")
SETS = 4 if DEVICE == "cuda" else 2


class Case(NamedTuple):
    rows: int
    hidden: int
    precision: str
    features: int = FEATURES

    @property
    def width(self) -> int:
        return (self.hidden + self.features) // 2

    @property
    def parameters(self) -> int:
        return self.width * (self.hidden + self.width + self.features)

    def floor(self, ceilings: dict[str, float]) -> float:
        """Seconds of forward and backward: six FLOPs per row and weight, or leaves read and gradients written once."""
        per_weight = 4 if self.precision == "autocast" else 2
        moved = 2 * per_weight * self.parameters + 2 * self.rows * (2 * self.hidden + self.features)
        return max(6 * self.rows * self.parameters / ceilings["flops"], moved / ceilings["bytes"])

    def leaves(self, seed: int) -> list[Tensor]:
        """hidden, target, three weights, three biases."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        width = self.width
        dtype = torch.float32 if self.precision == "autocast" else torch.bfloat16

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE) * scale

        shapes = ((width, self.hidden), (width, width), (self.features, width))
        parameters = [draw(*shape, scale=shape[1] ** -0.5) for shape in shapes]
        parameters += [draw(shape[0], scale=0.1) for shape in shapes]
        tokens = [draw(self.rows, self.hidden).bfloat16(), draw(self.rows, self.features).bfloat16()]
        leaves = tokens + [parameter.to(dtype) for parameter in parameters]
        return [leaf.requires_grad_(place != 1) for place, leaf in enumerate(leaves)]


def loss_of(case: Case, impl: str, leaves: list[Tensor]) -> Tensor:
    if impl == "explicit":
        return ExplicitAlignment.apply(leaves[0], leaves[1], torch.bfloat16, *leaves[2:])
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=case.precision == "autocast"):
        return alignment_loss(leaves[0], leaves[1], leaves[2:5], leaves[5:], impl=impl)


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])


def launches_of(implementation: str) -> AbstractContextManager[None]:
    """What the fused kernels launch inside; of graphs it is what they capture."""
    if "earlier" in implementation:
        from alignment_candidates import EARLIER, under

        return under(EARLIER[90])
    if "tma" in implementation:
        from alignment_tma import by_tma

        return by_tma()
    return nullcontext()


@lru_cache(maxsize=1)  # forward and both share one compilation
def passes(case: Case, implementation: str) -> tuple[list[list[Tensor]], dict[str, Callable[[int], Any]]]:
    """Sets of leaves, and `forward(i)` and `both(i)` on the i-th of them."""
    sets = [case.leaves(seed) for seed in range(SETS)]
    impl = "auto" if "fused" in implementation else "reference" if "compile" in implementation else implementation

    def loss(leaves: list[Tensor]) -> Tensor:
        return loss_of(case, impl, leaves)

    if "compile" in implementation:
        torch.compiler.reset()
        loss = torch.compile(loss, fullgraph=True)

    def both(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        value = loss(leaves)
        return value, *gradients(value, leaves)

    if not implementation.endswith("-graph"):
        return sets, {"forward": lambda i: loss(sets[i % SETS]), "both": lambda i: both(sets[i % SETS])}
    works = {"forward": loss, "both": both}
    with launches_of(implementation):
        captured = {name: [_capture(work, leaves) for leaves in sets] for name, work in works.items()}

    def replay(name: str) -> Callable[[int], Any]:
        def run(index: int) -> object:
            graph, output = captured[name][index % SETS]
            graph.replay()
            return output

        return run

    return sets, {name: replay(name) for name in captured}


def _capture(work: Callable, leaves: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work(leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work(leaves)
    return graph, output


def relative_errors(outputs: Sequence[Tensor], case: Case, leaves: list[Tensor]) -> list[float]:
    """Relative L2 distance of loss and gradients from the reference in fp64."""
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    value = alignment_loss(exact[0], exact[1], exact[2:5], exact[5:], impl="reference")
    truth = (value, *gradients(value, exact))
    pairs = zip(outputs, truth, strict=True)
    return [((ours.double() - true).norm() / true.norm()).item() for ours, true in pairs]


@lru_cache(maxsize=1)
def assert_correct(case: Case, implementation: str) -> float:
    """The gate: no timing is recorded for what is not as accurate as the reference. Returns the largest error."""
    sets, steps = passes(case, implementation)
    outputs = [tensor.detach().clone() for tensor in steps["both"](0)]
    ours = relative_errors(outputs, case, sets[0])
    value = loss_of(case, "reference", sets[0])
    theirs = relative_errors((value, *gradients(value, sets[0])), case, sets[0])
    for place, (error, own) in enumerate(zip(ours, theirs, strict=True)):
        assert error <= 2e-2 and error <= 3 * own + 1e-3, f"output {place}: error {error:.1e}, reference {own:.1e}"
    return max(ours)


def peak_memory(case: Case, step: Callable[[int], Any], leaves: list[Tensor]) -> dict[str, int]:
    """Bytes above the leaves at the peak of one step, split into gradients, bf16 weight copies and the rest."""
    gc.collect()  # garbage that happens to go during the step would lower the peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step(0)
    torch.cuda.synchronize()
    total = torch.cuda.max_memory_allocated() - before
    del outputs
    grads = sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)
    copies = 2 * case.parameters if case.precision == "autocast" else 0
    return {"peak": total, "gradients": grads, "weight_copies": copies, "saved_and_scratch": total - grads - copies}


@pytest.mark.parametrize("which", ("forward", "both"))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_alignment_loss(timed, record, ceilings, small, rows, hidden, precision, implementation, which):
    case = Case(rows // 8, hidden // 16, precision, FEATURES // 16) if small else Case(rows, hidden, precision)
    sets, steps = passes(case, implementation)
    error = assert_correct(case, implementation)
    seconds = timed(steps[which])
    memory = None  # graphs keep theirs in pools of their own
    if DEVICE == "cuda" and which == "both" and not implementation.endswith("graph"):
        memory = peak_memory(case, steps["both"], sets[0])
    if seconds is not None:
        row = {**case._asdict(), "pass": which, "implementation": implementation, "seconds": seconds}
        record("alignment_loss", {**row, "floor": case.floor(ceilings), "error": error, "memory": memory})
