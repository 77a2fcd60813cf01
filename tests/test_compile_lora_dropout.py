"""Every kernel of LoRA's dropout compiles ahead of time for every supported card, within its resources; no GPU."""

import json
from pathlib import Path

import pytest
from made_programs import SCRIPT, run_program

pytest.importorskip("triton", reason="the kernels need triton")

REGISTERS = {"down": 96, "down gradient": 128, "input gradient": 192}  # most per thread


def test_resources(tmp_path):
    output = tmp_path / "resources.json"
    root = Path(__file__).parents[1]
    command = [str(root / "benchmarks/compile_lora_dropout.py"), "--output", str(output)]
    run = run_program(SCRIPT, *command)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 6 * len(REGISTERS)
    for row in rows:
        assert row["stack_bytes"] == row["local_bytes"] == 0, f"spills: {row}"
        assert row["shared_kib"] <= row["shared_limit_kib"], f"more shared memory than the card has: {row}"
        assert row["registers"] <= REGISTERS[row["kernel"]], f"over budget: {row}"
        assert row["matrix_instruction"] and row["asynchronous_copy"], row
