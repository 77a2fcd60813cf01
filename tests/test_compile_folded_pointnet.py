"""The kernel of the folded mini-PointNet compiles ahead of time for every supported card, within its resources."""

import json
from pathlib import Path

import pytest
from made_programs import SCRIPT, run_program

pytest.importorskip("triton", reason="the kernel needs triton")

REGISTERS = {64: 208, 128: 255}  # most per thread, by points of a program


def test_resources_and_traffic(tmp_path):
    output = tmp_path / "resources.json"
    root = Path(__file__).parents[1]
    command = [str(root / "benchmarks/compile_folded_pointnet.py"), "--output", str(output)]
    run = run_program(SCRIPT, *command)
    assert run.returncode == 0, run.stderr[-4000:]
    content = json.loads(output.read_text())
    assert {80, 89, 90} <= {row["capability"] for row in content["rows"]}
    for row in content["rows"]:
        assert row["stack_bytes"] == row["local_bytes"] == 0, f"spills: {row}"
        assert row["shared_kib"] <= row["shared_limit_kib"], f"more shared memory than the card has: {row}"
        assert row["registers"] <= REGISTERS[row["rows"]], f"over budget: {row}"
        assert row["matrix_instruction"] and row["asynchronous_copy"], row
    plain, *fused = content["traffic"]
    # points [T k, 6], their vectors [T, 256] and the weights, in bf16: nothing else goes to device memory
    groups = content["clouds"] * content["groups"]
    weights = 6 * 128 + 128 * 256 + 3 * 256 * 512 + 128 + 256 + 512 + 256
    for row in fused:
        assert row["memory_bytes"] == 2 * (groups * (content["points"] * 6 + 256) + weights)
        assert plain["memory_bytes"] > 100 * row["memory_bytes"] and plain["launches"] > row["launches"] == 1
