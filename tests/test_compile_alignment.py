"""Every alignment kernel compiles ahead of time for every supported card, within its resources; needs no GPU."""

import json
from pathlib import Path

import pytest
from made_programs import SCRIPT, run_program

from pointalign_kernels.alignment_tiles import TILES

pytest.importorskip("triton", reason="the fused kernels need triton")

CAPABILITIES = (80, 86, 89, 90, 100, 120)
REGISTERS = {"linear": 192, "backward": 200, "cosine": 64, "mean": 48}  # most per thread, by the kernel's first word
REGISTERS_OF_A_MULTIPROCESSOR = 65536
KERNELS = ("linear+silu", "linear split-K", "backward", "backward fp32", "cosine D=768", "cosine D=2560", "mean")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """In a process of its own: nothing compiles in one that interprets."""
    output = tmp_path_factory.mktemp("compile") / "resources.json"
    root = Path(__file__).parents[1]
    command = [str(root / "benchmarks/compile_alignment.py"), "--tiles", "all", "--output", str(output)]
    run = run_program(SCRIPT, *command)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(output.read_text())["rows"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources(rows, capability):
    compiled = [row for row in rows if row["capability"] == capability]
    assert {row["kernel"] for row in compiled} == set(KERNELS)
    for row in compiled:
        assert row["stack_bytes"] == row["local_bytes"] == 0, f"spills: {row}"
        assert row["shared_kib"] <= row["shared_limit_kib"], f"more shared memory than the card has: {row}"
        if shares_a_multiprocessor(row):
            assert 2 * row["registers"] * 32 * row["num_warps"] <= REGISTERS_OF_A_MULTIPROCESSOR, f"over budget: {row}"
        else:
            assert row["registers"] <= REGISTERS[row["kernel"].split()[0].split("+")[0]], f"over budget: {row}"


def shares_a_multiprocessor(row: dict) -> bool:
    """Whether the tile is in the table because two blocks of it fit on a multiprocessor."""
    return (row["capability"], row["kernel"], row["num_warps"]) == (90, "backward", 4)


@pytest.mark.parametrize("capability,instruction", ((80, "mma.sync"), (90, "wgmma"), (100, "tcgen05.mma")))
def test_products_run_on_the_tensor_cores_with_asynchronous_copies(rows, capability, instruction):
    products = [row for row in rows if row["capability"] == capability and row["tile"] and "fp32" not in row["kernel"]]
    table = TILES[capability]
    assert len(products) == 2 * len(table.linear) + len(table.backward)
    for row in products:
        assert row["matrix_instruction"] == instruction and row["asynchronous_copy"], row
