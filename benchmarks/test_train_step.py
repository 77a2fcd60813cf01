"""One training step of Phi-2's shape, from the release's way to everything that `--fused` and the recipes offer.

    pytest benchmarks/test_train_step.py --benchmark-only        on CUDA under a cap of 22.5 GB, on a CPU a small shape

Every row trains on the same 16 samples with the same random weights, adapters, dropout and optimizer; speed does not
depend on the weights. A row is timed only after its loss and gradient norm, without dropout, equal those of the plain
modules; that of CUDA graphs also after losses and all gradients equal those of the row without. Rows that run out of
memory under the cap are recorded as such.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from train_step_rows import (
    BATCHES,
    CUDA,
    DEVICE,
    PROMPT,
    RANK,
    ROWS,
    SHAPE,
    STAGE,
    E,
    Row,
    described,
    lengths,
    make_batch,
    no_dropout,
    prepared,
    shape_of,
    text_config,
    whole_config,
)
from turns import synchronize

from pointalign.data.collator import PackShape
from pointalign.efficient import memory
from pointalign.efficient.graphs import decoder_in_graphs
from pointalign.trainer import AlignedModel

CAP_GB = 22.5
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 0.1  # of CUDA graphs; filled batches differ by rounding in bf16


def loss_and_gradients(
    aligned: AlignedModel, loss: Callable, batch: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Of a step without dropout: the loss and copies of all gradients, in the CPU's memory."""
    with no_dropout(aligned):
        aligned.zero_grad()
        value = loss(batch).item()
    gradients = {
        name: parameter.grad.to("cpu", torch.float32, copy=True)
        for name, parameter in aligned.named_parameters()
        if parameter.grad is not None
    }
    aligned.zero_grad()
    return value, gradients


def norm(gradients: dict[str, Tensor]) -> float:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def measured_loss(aligned: AlignedModel, loss: Callable, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Loss and norm of all gradients, without dropout."""
    value, gradients = loss_and_gradients(aligned, loss, batch)
    return value, norm(gradients)


def replayed_loss(
    aligned: AlignedModel, loss: Callable, batches: Sequence[dict[str, Tensor]], shape: PackShape
) -> tuple[float, float]:
    """Loss and norm of all gradients of the first batch, without dropout, from CUDA graphs.

    Raises: AssertionError: on a batch, loss or gradients are not those of row e, whose batches are not filled up.
    """
    expected = [loss_and_gradients(aligned, loss, batch) for batch in batches]
    with decoder_in_graphs(aligned.model.get_decoder()):
        replayed = [loss_and_gradients(aligned, partial(loss, shape=shape), batch) for batch in batches]
    for (value, gradients), (true_value, true_gradients) in zip(replayed, expected, strict=True):
        assert value == pytest.approx(true_value, rel=LOSS_TOLERANCE), "loss from CUDA graphs"
        assert gradients.keys() == true_gradients.keys()
        for name, gradient in gradients.items():
            error = (gradient - true_gradients[name]).norm() / true_gradients[name].norm()
            assert error < GRADIENT_TOLERANCE, f"gradient of {name} from CUDA graphs: relative error {error:.1e}"
    value, gradients = replayed[0]
    return value, norm(gradients)


_truth: dict[tuple, tuple[float, float]] = {}


def truth(row: Row, config: Any, rank: int, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Loss and gradient norm of the plain modules on the same inputs and weights: padded, nothing fused."""
    key = (config.hidden_size, len(batch["input_ids"]), row.quantization, row.online, row.targets)
    if key not in _truth:
        plain = Row("truth", kbit=False, quantization=row.quantization, online=row.online, targets=row.targets)
        with prepared(plain, config, rank) as (aligned, loss):
            _truth[key] = measured_loss(aligned, loss, batch)
    return _truth[key]


@pytest.fixture(scope="module", autouse=True)
def capped():
    if CUDA:
        memory.cap_memory(CAP_GB, DEVICE)
    yield
    if CUDA:
        memory.cap_memory(None, DEVICE)


def run_row(
    benchmark: Any, row: Row, config: Any, rank: int, rounds: int, sizes: tuple[int, ...] = BATCHES
) -> dict[str, Any] | None:
    """Gate, then time batches of `sizes` samples in turn: what a row needs per step; None under --benchmark-disable."""
    torch.compiler.reset()
    batches = [make_batch(whole_config(config), samples, seed) for seed, samples in enumerate(sizes)]
    expected = truth(row, config, rank, batches[0])
    shape = shape_of(batches) if row.graphs else None
    gc.collect()  # whatever else keeps an earlier model in a cycle: its memory would count as this row's
    if CUDA:
        torch.cuda.empty_cache()
    with prepared(row, config, rank) as (aligned, loss), ExitStack() as stack:
        if shape is not None:
            measured = replayed_loss(aligned, loss, batches[:2], shape)  # recorded on one, replayed on another
            loss = partial(loss, shape=shape)
        else:
            measured = measured_loss(aligned, loss, batches[0])
        errors = [abs(value - other) / abs(other) for value, other in zip(measured, expected, strict=True)]
        assert errors[0] < 1e-2 and errors[1] < 5e-2, f"{row.name}: loss and gradient norm {measured}, plain {expected}"
        if CUDA:
            torch.cuda.empty_cache()  # the graphs without dropout
            torch.cuda.reset_peak_memory_stats()
        if shape is not None:
            stack.enter_context(decoder_in_graphs(aligned.model.get_decoder()))
        optimizer = torch.optim.AdamW([p for p in aligned.parameters() if p.requires_grad], lr=3e-6, fused=True)
        state = {"index": 0}

        def step() -> None:
            loss(batches[state["index"] % len(batches)])
            optimizer.step()
            optimizer.zero_grad()
            state["index"] += 1
            synchronize(DEVICE)

        benchmark.pedantic(step, rounds=rounds, warmup_rounds=2 * len(batches) if CUDA else 1)
        peak = torch.cuda.max_memory_allocated() if CUDA else None
        used = memory.device_used_bytes(DEVICE) if CUDA else None
    if benchmark.stats is None:
        return None
    return speeds(benchmark.stats.stats.data, sizes) | {
        "peak_gb": None if peak is None else peak / 1e9,
        "device_gb": None if used is None else used / 1e9,
        "loss_error": errors[0],
        "gradient_norm_error": errors[1],
        "out_of_memory": False,
        "filled_to": None if shape is None else shape.tokens,
    }


def speeds(times: Sequence[float], sizes: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of a step, and samples and tokens a second; tokens that fill a batch up do not count."""
    seconds = sorted(times)
    tokens = [pair for seed, samples in enumerate(sizes) for pair in lengths(samples, seed)]
    samples = sum(sizes) / len(sizes)
    supervised = sum(answer for _, answer in tokens) / len(sizes)
    real = sum(question + answer + PROMPT + 32 for question, answer in tokens) / len(sizes)
    # of unequal batches the median would be that of one size
    typical = seconds[len(seconds) // 2] if len(set(sizes)) == 1 else sum(seconds) / len(seconds)
    return {
        "seconds": {
            "p20": seconds[len(seconds) // 5],
            "p50": seconds[len(seconds) // 2],
            "p80": seconds[4 * len(seconds) // 5],
            "mean": sum(seconds) / len(seconds),
        },
        "steps": len(seconds),
        "samples": samples,
        "samples_per_second": samples / typical,
        "supervised_tokens_per_second": supervised / typical,
        "tokens_per_second": real / typical,
        "tokens": real,
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.partition(":")[0])
def test_train_step(benchmark, record, row):
    if row.graphs and not CUDA:
        pytest.skip("CUDA graphs need a GPU")
    try:
        result = run_row(benchmark, row, text_config(), RANK, (200 if row is E else 20) if CUDA else 5)
    except torch.OutOfMemoryError:
        result = {"seconds": None, "samples": BATCHES[0], "out_of_memory": True}
    if result is not None:
        mix = {"shape": SHAPE, "rank": RANK, "lengths": lengths(BATCHES[0], 0)}
        record("train_step", {**mix, **described(row), **result})


def test_the_papers_batches(benchmark, record):
    """Steps of the alignment stage as the paper draws them: 6, 10 or 4 samples."""
    result = run_row(benchmark, E, text_config(), RANK, 200 if CUDA else 6, STAGE)
    if result is not None:
        record("train_step_stage", {"shape": SHAPE, "batches": STAGE, **described(E), **result})


@pytest.mark.parametrize("samples", (4, 8, 16, 32) if CUDA else (1, 2, 4))
def test_cost_is_linear_in_tokens(benchmark, record, samples):
    result = run_row(benchmark, E, text_config(), RANK, 20 if CUDA else 3, (samples,) * len(BATCHES))
    if result is not None:
        record("train_step_tokens", {"shape": SHAPE, **described(E), **result})


@pytest.mark.skipif(not CUDA, reason="8 billion parameters need a GPU")
def test_8b_fits_24_gb(benchmark, record):
    row = E._replace(name="8B Llama, 4 bits, everything but dequantised weights", dequantize_once=False)
    result = run_row(benchmark, row, text_config("llama-8b"), 16, 20, (4,) * 4)
    if result is not None:
        record("train_step_8b", {"shape": "Llama 8B", "rank": 16, **described(row), **result})
