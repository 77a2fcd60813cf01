"""benchmarks/warm_triton.py compiles every kernel that training and the encoder launch; no GPU, nothing runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

ROOT = Path(__file__).parents[1]
# Kernels warmed, and those that steps and encoder of the GPU suite compile beyond them.
PROGRAM = """
import json
from types import SimpleNamespace
from unittest.mock import patch
import torch
import warm_triton
from pointalign.efficient.fused_lora import AdapterGroup, LoraProducts
from pointalign.models.configuration import PRESETS, PointBertConfig
from pointalign.models.point_encoder import MiniPointNet
from pointalign_kernels import folded_pointnet, lora_dropout

def group(rank, inputs, outputs):
    def layer(size):
        base = torch.nn.Linear(inputs, size, device="meta", dtype=torch.bfloat16).requires_grad_(False)
        down, up = (torch.nn.Linear(*shape, bias=False, device="meta") for shape in ((inputs, rank), (rank, size)))
        return SimpleNamespace(
            get_base_layer=lambda: base, r={"default": rank}, scaling={"default": 0.25}, forward=None,
            lora_A={"default": down}, lora_B={"default": up},
        )
    return AdapterGroup([layer(size) for size in outputs])

def step(rank, inputs, outputs, tokens):
    layers = group(rank, inputs, outputs)
    x = torch.empty(1, tokens, inputs, device="meta", dtype=torch.bfloat16, requires_grad=True)
    outputs = LoraProducts.apply(x, layers, torch.bfloat16, 0.05, *layers.adapters())
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])

compiled = warm_triton.compile_only()
warm_triton.launch_lora_dropouts()
warm_triton.launch_pointnet()
warmed = set(compiled)
available = lambda device_type: True
with patch.object(lora_dropout, "fused_available", available):
    for tokens in (257, 700, 2112, 2113, 4500, 8448, 8449, 9000):
        phi, llama = 2560, 4096
        step(64, phi, [phi, phi, phi, 4 * phi], tokens)  # rows d9 to f
        step(64, phi, [phi] * 3, tokens)  # row e2
        step(64, phi, [4 * phi], tokens)  # row d8
        step(64, 4 * phi, [phi], tokens)
        step(16, llama, [llama, 1024, 1024], tokens)  # the 8B model
        step(16, llama, [llama], tokens)
        step(16, llama, [14336] * 2, tokens)
        step(16, 14336, [llama], tokens)
sizes = PointBertConfig(**PRESETS["minigpt3d-phi2"]["point_config"])
with torch.no_grad(), patch.object(folded_pointnet, "fused_available", available):
    net = MiniPointNet(sizes.in_channels, sizes.pointnet_width or sizes.group_dim, sizes.group_dim)
    net = net.to("meta", torch.bfloat16).eval()
    for batch in (1, 16):
        groups = (batch, sizes.num_groups, sizes.group_size, sizes.in_channels)
        net(torch.empty(groups, device="meta", dtype=torch.bfloat16))
print("KERNELS", json.dumps([sorted(name for name, _ in warmed), [str(key) for key in compiled - warmed]]))
"""


def test_steps_and_encoder_compile_nothing_more():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "benchmarks"))
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    warmed, more = json.loads(run.stdout.partition("KERNELS ")[2])
    assert set(warmed) == {
        "down_kernel",
        "down_gradient_kernel",
        "input_gradient_kernel",
        "sum_kernel",
        "folded_pointnet_kernel",
    }
    assert more == []
