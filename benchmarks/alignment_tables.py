"""Tables of the alignment loss for benchmarks/report.py: floors, predictions, traffic, needs of the kernels."""

import json
from pathlib import Path
from typing import Any

from alignment_model import CARDS
from tables import table
from test_alignment_loss import Case

RESULTS = Path(__file__).parent / "results"


def _predictions() -> list[dict[str, Any]]:
    return json.loads((RESULTS / "alignment_traffic.json").read_text())["rows"]


def _range(us: list[float]) -> str:
    """Microseconds at L2's high and low rate."""
    low, high = f"{min(us):.0f}", f"{max(us):.0f}"
    return low if low == high else f"{low} to {high}"


def alignment_cards(results: list[dict]) -> str:
    """Floor and prediction of forward + backward beside what was measured, if anything was."""
    measured = {
        (card, row["rows"], row["hidden"], row["precision"]): f"{1e6 * row['seconds']['p50']:.0f}"
        for result in results
        for card in CARDS
        if card in result["provenance"]["device"]
        for row in result["rows"]
        if (row["implementation"], row["pass"]) == ("fused-graph", "both")
    }
    predicted = {
        (row["card"], row["rows"], row["precision"]): _range(row["us"])
        for row in _predictions()
        if (row["hidden"], row["tiles"]) == (2560, "table")
    }
    lines = []
    for precision in ("autocast", "bf16"):
        for tokens in (128, 256, 512, 1024):
            case = Case(tokens, 2560, precision)
            line = [precision, str(tokens)]
            for name, card in CARDS.items():
                floor = case.floor({"flops": card.flops, "bytes": card.memory})
                line += [f"{1e6 * floor:.0f}", predicted[name, tokens, precision]]
                line.append(measured.get((name, tokens, 2560, precision), "not measured"))
            lines.append(line)
    titles = (title for card in CARDS for title in (f"{card}: floor", "predicted", "measured"))
    intro = (
        "Forward + backward, 2560-1664-1664-768, us. Floor: operations and bytes at attainable rates. Predicted: from "
        "the traffic and occupancy of the kernels, at L2's high and low rate. Measured: the fused kernels as a CUDA "
        "graph.\n\n"
    )
    return intro + table(["precision", "M", *titles], lines)


def alignment_traffic() -> str:
    """Predicted time under the earlier tiles and the table's, and the traffic of every launch at M = 512."""
    content = json.loads((RESULTS / "alignment_traffic.json").read_text())
    rows = {
        (row["rows"], row["hidden"], row["tiles"]): row
        for row in content["rows"]
        if (row["card"], row["precision"]) == ("H100", "bf16")
    }
    lines = []
    for hidden in sorted({key[1] for key in rows}):
        for tokens in sorted({key[0] for key in rows}):
            times = (_range(rows[tokens, hidden, tiles]["us"]) for tiles in ("earlier", "table", "best"))
            lines.append([f"{hidden}-{Case(tokens, hidden, 'bf16').width}", str(tokens), *times])
    origin, low_high = content["provenance"], content["assumed"]["cards"]["H100"]["l2"]
    intro = (
        f"H100, bf16, predicted us of forward + backward. A model, not a measurement (`benchmarks/alignment_model.py`; "
        f"{low_high[0] / 1e12:g} to {low_high[1] / 1e12:g} TB/s from L2 and the other rates are assumed); triton "
        f"{origin['triton']}, commit {origin['commit']}, {origin['date']}. Best: for each launch the candidate tile "
        "with the least predicted time, of those that spill no registers.\n\n"
    )
    text = intro + table(["hidden-width", "M", "earlier tiles", "the table's tiles", "best"], lines)
    lines = []
    earlier = {row["launch"]: row for row in rows[512, 2560, "earlier"]["launches"]}
    for row in rows[512, 2560, "table"]["launches"]:
        line = [row["launch"]]
        for launch in (earlier[row["launch"]], row):
            line += [launch.get("tile", "").replace(" | ", ", dW "), _programs(launch), f"{launch['l2_mb']:.0f}"]
            line.append(_range(launch["us"]))
        lines.append([*line, f"{row['memory_mb']:.0f}"])
    header = ["launch", "earlier tile", "programs (waves)", "L2 MB", "us", "tile", "programs (waves)", "L2 MB", "us"]
    note = (
        "M = 512, 2560-1664-1664-768 on an H100. Tile: rows x columns x depth x warps x stages, of dx where dW has its "
        "own. Programs: all of a launch, in waves of the blocks that the card holds.\n\n"
    )
    return f"{text}\n{note}{table([*header, 'device memory MB'], lines)}"


def _programs(launch: dict[str, Any]) -> str:
    if "programs" not in launch:
        return ""
    counts = " + ".join(f"{count} {name}" for name, count in launch["programs"].items())
    return f"{counts} ({launch['waves']:.2g})"


def alignment_resources() -> str:
    """The most that any tile of each kernel needs."""
    content = json.loads((RESULTS / "alignment_resources.json").read_text())
    lines = []
    for name, card in CARDS.items():
        rows = [row for row in content["rows"] if row["capability"] == card.capability]
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            same = [row for row in rows if row["kernel"] == kernel]
            registers, spills, shared = (
                max(row[name] for row in same) for name in ("registers", "stack_bytes", "shared_kib")
            )
            limit, instruction = same[0]["shared_limit_kib"], same[0]["matrix_instruction"] or "none"
            lines.append([f"{name}, {kernel}", str(registers), str(spills), f"{shared:.1f} of {limit}", instruction])
    header = ["kernel", "registers", "spilled bytes", "shared KiB", "matrix instruction"]
    origin = content["provenance"]
    where = f"triton {origin['triton']}, commit {origin['commit']}, {origin['date']}"
    return f"Compiled ahead of time, the largest need over all tiles; {where}.\n\n{table(header, lines)}"
