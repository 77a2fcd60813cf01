"""The traffic model of the alignment loss: its bytes against sums by hand, its table against its candidates."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from alignment_model import CARDS, Programs, device_memory_bytes, launches, makespan_us, step_us

from pointalign_kernels.alignment_tiles import TILES, Tile, choose_backward, choose_linear

ROOT = Path(__file__).parents[1]


def test_bytes_from_l2_of_a_linear():
    """F1 at M = 512: 4 x 13 tiles of 128 x 128, each 2560 / 64 steps of 256 x 64 numbers, and z and a written."""
    (launch,) = (step for step in launches(CARDS["H100"], TILES[90], 512, 2560, "bf16") if step.name == "F1")
    (programs,) = launch.programs
    assert programs.count == 4 * 13
    assert programs.l2_bytes == 52 * (40 * 256 * 64 * 2 + 128 * 128 * 4)


def test_device_memory_holds_weights_once_where_l2_holds_them_for_the_backward_pass():
    steps = launches(CARDS["H100"], TILES[90], 128, 2560, "bf16")
    weights = 2 * (1664 * 2560 + 1664 * 1664 + 768 * 1664)
    large, small = (sum(device_memory_bytes(steps, capacity)) for capacity in (50e6, 6e6))
    assert small - large > 0.9 * weights  # read again in the backward pass


def test_time_of_programs():
    card = CARDS["H100"]
    programs = Programs("linear", 1, Tile(128, 128, 64, 8, 4), 128, 100, 0)
    alone = makespan_us(card, card.l2[0], (programs,), 1)
    two_waves = makespan_us(card, card.l2[0], (programs._replace(count=264),), 1)
    full = makespan_us(card, card.l2[0], (programs._replace(count=132),), 1)
    assert two_waves == pytest.approx(2 * full) and full > alone
    assert step_us(card, card.l2[0], programs, 132) == pytest.approx(
        1e6 * 256 * 64 * 2 * 132 / card.l2[0] + card.wait_us
    )


def test_the_choice_follows_the_number_of_programs():
    tiles = TILES[90]
    assert choose_linear(tiles, 132, 1, 512, 1664).rows == 128
    assert choose_linear(tiles, 132, 1, 128, 1664) == tiles.linear[-1]
    assert choose_backward(tiles, 132, 1, 1024, 1664, 1664, True) == tiles.backward[0]
    assert choose_backward(tiles, 132, 1, 128, 1664, 1664, True) == tiles.backward[-1]
    for pair in (pair for table in TILES.values() for pair in table.backward):
        assert (pair.dx.warps, pair.dx.stages) == (pair.dw.warps, pair.dw.stages)


def test_the_recorded_predictions_speak_for_the_table():
    """No chosen tile spills; on sm_90 the table is nowhere slower than the earlier tiles and near the best."""
    content = json.loads((ROOT / "benchmarks/results/alignment_traffic.json").read_text())
    spilled = {(row["capability"], row["tile"]) for row in content["resources"] if row["stack_bytes"]}
    totals = {}
    for row in content["rows"]:
        totals[row["card"], row["rows"], row["hidden"], row["precision"], row["tiles"]] = sum(row["us"])
        for launch in row["launches"]:
            assert (CARDS[row["card"]].capability, launch.get("tile")) not in spilled
    for key, us in totals.items():
        if key[0] in ("H100", "H200") and key[-1] == "table":
            case = key[:-1]
            assert us <= totals[(*case, "earlier")] and us <= 1.1 * totals[(*case, "best")], case
