"""Traffic, occupancy and predicted time of every launch of the alignment loss, without a card.

    python benchmarks/alignment_traffic.py [--output benchmarks/results/alignment_traffic.json]

Compiles the candidate tiles ahead of time (registers, spills, shared memory), leaves out those that spill, and predicts
forward + backward under the earlier tile table, under the library's and under the best candidates.
The model is benchmarks/alignment_model.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from alignment_candidates import BACKWARD, EARLIER, LINEAR, SPILLING_BACKWARD, SPILLING_LINEAR
from alignment_model import CARDS, END_US, LATENCY_US, LAUNCH_US, START_US, Card, Known, Resources, predict, words

from pointalign_kernels.alignment_tiles import BackwardTile, Tile, Tiles, tiles_of

ROWS = (128, 256, 512, 1024)
HIDDEN = (2560, 2048)
PRECISIONS = ("bf16", "autocast")


def expected_registers(tile: Tile | BackwardTile) -> int:
    """Before anything is compiled: the accumulators and what 128 x 128 tiles need beside them."""
    tiles = tile if isinstance(tile, BackwardTile) else (tile,)
    beside = 90 if isinstance(tile, BackwardTile) else 76
    return max(each.rows * each.cols // (32 * each.warps) for each in tiles) + beside


def candidates(capability: int) -> tuple[list[Tile], list[BackwardTile]]:
    """Tiles of the library's table, of the earlier table and of what the model chooses from."""
    tables = [tiles_of(capability), *([EARLIER[capability]] if capability in EARLIER else [])]
    linear = [tile for table in tables for tile in table.linear]
    linear += [*LINEAR.get(capability, ()), *SPILLING_LINEAR.get(capability, ())]
    backward = [tile for table in tables for tile in table.backward]
    backward += [*BACKWARD.get(capability, ()), *SPILLING_BACKWARD.get(capability, ())]
    return list(dict.fromkeys(linear)), list(dict.fromkeys(backward))


def compile_candidates(capability: int) -> list[dict[str, Any]]:
    """What every candidate needs, beside what was expected."""
    from compile_alignment import backward_case, compile_case, linear_case

    linear, backward = candidates(capability)
    rows = []
    for kernel, tiles, case in (("linear", linear, linear_case), ("backward", backward, backward_case)):
        for tile in tiles:
            compiled = compile_case(capability, *case(tile))
            row = {"capability": capability, "kernel": kernel, "tile": words(tile)}
            row |= {"expected_registers": expected_registers(tile)}
            row |= {name: compiled[name] for name in ("registers", "stack_bytes", "local_bytes", "shared_kib")}
            rows.append(row)
            print(row, flush=True)
    return rows


def known_resources(rows: list[dict[str, Any]], capability: int) -> Known:
    return {
        (row["kernel"], row["tile"]): Resources(row["registers"], _spilled(row), row["shared_kib"])
        for row in rows
        if row["capability"] == capability
    }


def _spilled(row: dict[str, Any]) -> int:
    return row["stack_bytes"] + row["local_bytes"]


def best_candidates(card: Card, known: Known, rows: int, hidden: int, precision: str) -> list[dict[str, Any]]:
    """For each launch the candidate, of those that do not spill, with the least predicted time."""
    linear, backward = candidates(card.capability)
    linear = [tile for tile in linear if not known["linear", words(tile)].spilled_bytes]
    backward = [tile for tile in backward if not known["backward", words(tile)].spilled_bytes]
    count = max(len(linear), len(backward))
    tables = [Tiles((linear[i % len(linear)],), 0, (backward[i % len(backward)],), 0) for i in range(count)]
    runs = [predict(card, known, table, rows, hidden, precision) for table in tables]
    return [min(same_launch, key=lambda row: sum(row["us"])) for same_launch in zip(*runs, strict=True)]


def predictions(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every card, size and precision under the earlier table, the library's and the best candidates."""
    rows = []
    for name, card in CARDS.items():
        known = known_resources(resources, card.capability)
        for tokens in ROWS:
            for hidden in HIDDEN:
                for precision in PRECISIONS:
                    sets = {"table": predict(card, known, tiles_of(card.capability), tokens, hidden, precision)}
                    if card.capability in EARLIER:
                        earlier = EARLIER[card.capability]
                        sets["earlier"] = predict(card, known, earlier, tokens, hidden, precision)
                    sets["best"] = best_candidates(card, known, tokens, hidden, precision)
                    for tiles, predicted in sets.items():
                        us = [sum(row["us"][end] for row in predicted) for end in range(2)]
                        case = {"card": name, "rows": tokens, "hidden": hidden, "precision": precision, "tiles": tiles}
                        rows.append(case | {"us": us, "launches": predicted})
    return rows


def main() -> None:
    import torch

    from pointalign.storage import provenance

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/alignment_traffic.json")
    options = parser.parse_args()
    resources = [row for capability in (90, 89, 86) for row in compile_candidates(capability)]
    content = {
        "provenance": provenance(torch.device("cpu")),
        "assumed": {
            "cards": {name: card._asdict() for name, card in CARDS.items()},
            "latency_us": LATENCY_US,
            "start_us": START_US,
            "end_us": END_US,
            "launch_us": LAUNCH_US,
        },
        "resources": resources,
        "rows": _rounded(predictions(resources)),
    }
    options.output.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
