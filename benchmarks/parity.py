"""Validated against plain PyTorch: every operator of the training step, dtype by implementation, against float64.

    python benchmarks/parity.py [--output benchmarks/results]

Each case runs on this machine's device. The error is the relative L2 distance to the same formula in float64 on the
same (rounded) inputs, the larger of output and gradients. Writes parity_<device>.json and parity_table.md.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from turns import measured_ceilings

from pointalign.efficient import fused_lora, fused_parts
from pointalign.efficient.varlen_attention import varlen_attention
from pointalign.evaluation import markdown_table
from pointalign.storage import ROOT, device_name, provenance
from pointalign_kernels import alignment_loss, fused_available

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
ROWS, WIDTH, INNER, RANK, VOCABULARY = 96, 320, 640, 16, 1000
LENGTHS = (17, 40, 39)  # of packed samples

Function = Callable[..., Tensor]


def seeded(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def cases() -> dict[str, tuple[list[Tensor], Function, dict[str, Function]]]:
    """Per operator: leaves, the formula in plain PyTorch, and the other implementations."""
    x, gate, up = seeded(ROWS, WIDTH), seeded(ROWS, INNER, seed=1), seeded(ROWS, INNER, seed=2)
    weight, bias = seeded(WIDTH, scale=0.3) + 1, seeded(WIDTH, seed=3)
    return {
        "tanh-GELU": (
            [gate],
            lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
            {"fused": lambda x: functional.gelu(x, approximate="tanh")},
        ),
        "silu(gate) * up": (
            [gate, up],
            lambda gate, up: functional.silu(gate) * up,
            {"fused": lambda *halves: fused_parts.SiluProduct.apply(*halves)},
        ),
        "layer norm": (
            [x],  # the weights of norms are frozen
            lambda x: (
                (x - x.mean(1, True)) * (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt() * weight.to(x)
                + bias.to(x)
            ),
            {"fused": lambda x: functional.layer_norm(x, (WIDTH,), weight.to(x), bias.to(x))},
        ),
        "RMS norm": ([x], partial(_rms_norm, weight), {"fused": partial(_lean_rms_norm, weight)} | _liger_norm(weight)),
        "rotary embedding": _rotary(),
        "LoRA linear": _lora(1),
        "LoRA linear, three merged": _lora(3),
        "attention, packed": _attention(),
        "head + cross-entropy": _cross_entropy(),
        "alignment loss": _alignment(),
    }


def _rms_norm(weight: Tensor, x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(1, True) + 1e-6).rsqrt() * weight.to(x)


def _lean_rms_norm(weight: Tensor, x: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight.to(x), 1e-6)


def _liger_norm(weight: Tensor) -> dict[str, Function]:
    function = fused_parts.liger_rms_norm()
    if function is None or DEVICE.type != "cuda":
        return {}
    return {"liger-kernel": lambda x: function(x, weight.to(x), 1e-6, 0.0, "llama", False)}


def _rotary() -> tuple[list[Tensor], Function, dict[str, Function]]:
    """Of q and k, laid side by side; a part of each head turns, as in Phi."""
    heads, groups, width, turning = 4, 2, 32, 12
    angles = seeded(1, ROWS, turning // 2).repeat(1, 1, 2)

    def plain(both: Tensor) -> Tensor:
        def turn(x: Tensor) -> Tensor:
            half = torch.cat((-x[..., turning // 2 :], x[..., : turning // 2]), dim=-1)
            return x * angles.cos().to(x) + half * angles.sin().to(x)

        return torch.cat((turn(both[..., :turning]), both[..., turning:]), dim=-1)

    def by_liger(both: Tensor) -> Tensor:
        q, k = both.split((heads, groups), dim=1)
        liger = fused_parts.liger_rotary()
        assert liger is not None
        turned = torch.cat(liger(q[..., :turning], k[..., :turning], angles.cos().to(q), angles.sin().to(q)), dim=1)
        return torch.cat((turned, both[..., turning:]), dim=-1)

    here = DEVICE.type == "cuda" and fused_parts.liger_rotary() is not None
    return [seeded(1, heads + groups, ROWS, width)], plain, {"liger-kernel": by_liger} if here else {}


def _lora(count: int) -> tuple[list[Tensor], Function, dict[str, Function]]:
    weights = [seeded(INNER, WIDTH, scale=WIDTH**-0.5, seed=i) for i in range(count)]
    down = [seeded(RANK, WIDTH, scale=WIDTH**-0.5, seed=10 + i) for i in range(count)]
    up = [seeded(INNER, RANK, scale=0.3, seed=20 + i) for i in range(count)]

    def plain(x: Tensor, *adapters: Tensor) -> Tensor:
        pairs = zip(weights, adapters[:count], adapters[count:], strict=True)
        return torch.cat([x @ w.to(x).mT + 0.5 * ((x @ a.mT) @ b.mT) for w, a, b in pairs], dim=1)

    def lean(x: Tensor, *adapters: Tensor) -> Tensor:
        return torch.cat(_lora_products(weights, x, *adapters), dim=1)

    return [seeded(ROWS, WIDTH, seed=30), *down, *up], plain, {"fused": lean}


class _LoraLayer:
    """What `AdapterGroup` asks of peft's LoRA layer; its adapters are passed apart, so that they are leaves."""

    disable_adapters, merged = False, False
    r, scaling = {"default": RANK}, {"default": 0.5}

    def __init__(self, weight: Tensor):
        self.base = nn.Linear(WIDTH, INNER, bias=False)
        self.base.weight = nn.Parameter(weight, requires_grad=False)
        self.forward = self.base.forward

    def get_base_layer(self) -> nn.Linear:
        return self.base


def _lora_products(weights: list[Tensor], x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
    group = fused_lora.AdapterGroup([_LoraLayer(weight.to(x)) for weight in weights])
    return fused_lora.LoraProducts.apply(x, group, x.dtype, 0.0, *adapters)  # type: ignore[return-value]


def _attention() -> tuple[list[Tensor], Function, dict[str, Function]]:
    heads, groups, width, total = 4, 2, 32, sum(LENGTHS)
    leaves = [seeded(1, heads, total, width), *(seeded(1, groups, total, width, seed=i) for i in (1, 2))]
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    allowed = (sample[:, None] == sample) & torch.ones(total, total).tril().bool()

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (key, value))
        scores = query @ key.mT * width**-0.5
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf).softmax(3) @ value

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = allowed.to(query.device)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    def varlen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, _ = varlen_attention(
            nn.Identity(),
            query,
            key,
            value,
            None,
            width**-0.5,
            cu_seq_lens_q=borders.to(query.device),
            max_length_q=max(LENGTHS),
        )
        return output.transpose(1, 2)

    return leaves, plain, {"sdpa": sdpa, "varlen": varlen}


def _cross_entropy() -> tuple[list[Tensor], Function, dict[str, Function]]:
    weight, bias = seeded(VOCABULARY, WIDTH, scale=WIDTH**-0.5), seeded(VOCABULARY, scale=0.1)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def plain(rows: Tensor) -> Tensor:
        logits = rows @ weight.to(rows).mT + bias.to(rows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(logits, targets, reduction="sum")

    def lean(rows: Tensor) -> Tensor:
        return fused_parts.LinearCrossEntropy.apply(rows, weight.to(rows), bias.to(rows), targets)  # type: ignore[return-value]

    others: dict[str, Function] = {"fused": lean}
    if hasattr(nn, "LinearCrossEntropyOptions"):  # PyTorch 2.13
        options = nn.LinearCrossEntropyOptions()
        others["PyTorch's own"] = lambda rows: functional.linear_cross_entropy(
            rows, weight.to(rows), targets, linear_bias=bias.to(rows), reduction="sum", options=options
        )
    if DEVICE.type == "cuda" and (liger := fused_parts.liger_cross_entropy()) is not None:
        others["liger-kernel"] = lambda rows: liger(rows, weight.to(rows), targets, bias.to(rows))
    return [seeded(ROWS, WIDTH)], plain, others


def _alignment() -> tuple[list[Tensor], Function, dict[str, Function]]:
    sizes, width = 192, (WIDTH + 192) // 2
    shapes = ((width, WIDTH), (width, width), (sizes, width))
    target = seeded(ROWS, sizes)
    leaves = [seeded(ROWS, WIDTH), *(seeded(*shape, scale=shape[1] ** -0.5) for shape in shapes)]
    leaves += [seeded(shape[0], scale=0.1, seed=4) for shape in shapes]

    def of(impl: str) -> Function:
        return lambda hidden, *weights: alignment_loss(hidden, target.to(hidden), weights[:3], weights[3:], impl=impl)

    return leaves, of("reference"), {"fused": of("auto")} if fused_available(DEVICE.type) else {}


def outputs(function: Function, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of a fixed linear form of it, for the leaves rounded to `dtype`."""
    rounded = [leaf.to(DEVICE, dtype).requires_grad_() for leaf in leaves]
    output = function(*rounded)
    form = seeded(*output.shape, seed=7).to(output) if output.ndim else torch.ones_like(output)
    return [output.detach(), *torch.autograd.grad(output, rounded, form)]


def error(function: Function, leaves: list[Tensor], dtype: torch.dtype, truth: list[Tensor]) -> float:
    computed = outputs(function, leaves, dtype)
    pairs = zip(computed, truth, strict=True)
    return max(((one.double() - exact).norm() / exact.norm()).item() for one, exact in pairs)


def rows() -> list[dict[str, Any]]:
    measured = []
    for name, (leaves, plain, others) in cases().items():
        for dtype in DTYPES:
            rounded = [leaf.to(dtype) for leaf in leaves]
            truth = outputs(plain, rounded, torch.float64)
            for implementation, function in ({"plain PyTorch": plain} | others).items():
                measured.append(
                    {
                        "operator": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "implementation": implementation,
                        "error": error(function, rounded, dtype, truth),
                    }
                )
    return measured


def table(content: dict[str, Any]) -> str:
    """Markdown: one line per operator and dtype, one column per implementation."""
    measured = content["rows"]
    columns = list(dict.fromkeys(row["implementation"] for row in measured))
    lines = []
    for key in dict.fromkeys((row["operator"], row["dtype"]) for row in measured):
        errors = {row["implementation"]: row["error"] for row in measured if (row["operator"], row["dtype"]) == key}
        lines.append([*key, *(f"{errors[name]:.1e}" if name in errors else "" for name in columns)])
    where = content["provenance"]
    title = (
        f"Relative L2 error against float64, the larger of output and gradients; {where['device']}, "
        f"torch {where['torch']}, commit {where['commit']}, {where['date']}."
    )
    header = ["operator", "dtype", *columns]
    return f"{title}\n\n{markdown_table(header, lines, 'll' + 'r' * len(columns))}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    ceilings = measured_ceilings(DEVICE, False, time.perf_counter)
    content = {"benchmark": "parity", "provenance": provenance(DEVICE), "ceilings": ceilings, "rows": rows()}
    slug = "cpu" if DEVICE.type == "cpu" else re.sub(r"\W+", "_", device_name(DEVICE).lower())
    (output / f"parity_{slug}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
