"""The section feature_cache of benchmarks/report.py: what an object costs, how long 660K take, how precise they are."""

import json
from pathlib import Path

from point_ops_report import GOALS, PREDICTED_BATCHES, predicted_us
from tables import stamp, table

RESULTS = Path(__file__).parent / "results"
OBJECTS = 660_000  # with captions in PointLLM's data
CARD = "H100"
RATES = {"float32": 50e12, "TF32": 395e12, "bfloat16": 790e12}  # dense operations a second of an H100, assumed
SHARE = 0.5  # of the rate that products of this size reach, assumed
PROCESSES = (1, 8, 16)


def point_op_seconds() -> float:
    """Sampling and grouping of an object on an H100: the upper ends of what benchmarks/point_ops_report.py predicts."""
    batch = PREDICTED_BATCHES[0]
    return sum(predicted_us(race, batch) for race in GOALS) * 1e-6 / batch


def card_seconds(operations: float, precision: str) -> float:
    """Predicted seconds of the card for an object at the paper's sizes."""
    return operations / (RATES[precision] * SHARE) + point_op_seconds()


def hours(card: float, host: float, processes: int) -> float:
    """Hours for all objects: processes read and write beside one another, and share one card.

    Args:
        card: its seconds for an object.
        host: seconds of a process for reading and writing an object.
    """
    return OBJECTS * max(card, (card + host) / processes) / 3600


def feature_cache() -> str:
    """Measured on a CPU, predicted for a GPU with the arithmetic, and the precision of cheaper products."""
    content = json.loads((RESULTS / "feature_cache_cpu.json").read_text())
    paper = content["minigpt3d-phi2"]
    host = paper["read_seconds"] + content["write_seconds"]
    lines = []
    for name in ("minigpt3d-phi2", "mini"):
        row = content[name]
        together = row["read_seconds"] + row["encode_seconds"] + content["write_seconds"]
        numbers = [row["read_seconds"] * 1e3, row["encode_seconds"] * 1e3, content["write_seconds"] * 1e3]
        lines.append(
            [name, f"{row['operations'] / 1e9:.3g}", *(f"{number:.3g}" for number in numbers), f"{1 / together:.3g}"]
        )
    header = ["sizes", "10^9 operations an object", "read, ms", "encode, ms", "write, ms", "objects/s of a core"]
    parts = [f"{stamp(content['provenance'])} One thread, CPU seconds.\n", table(header, lines)]
    predicted = []
    for precision in RATES:
        card = card_seconds(paper["operations"], precision)
        times = [f"{hours(card, host, processes):.2g}" for processes in PROCESSES]
        predicted.append([precision, f"{card * 1e3:.2g}", *times])
    titles = [f"hours, {count} process{'' if count == 1 else 'es'}" for count in PROCESSES]
    parts.append(table([f"{CARD}, predicted", "ms of the card an object", *titles], predicted))
    rates = ", ".join(f"{rate / 1e12:.0f} ({name})" for name, rate in RATES.items())
    parts.append(
        f"For {OBJECTS:,} objects at the paper's sizes on one card. Of the card: {paper['operations'] / 1e9:.3g} x "
        f"10^9 operations at {SHARE:.0%} of {rates} TFLOP/s, assumed, and {point_op_seconds() * 1e6:.0f} us for "
        f"sampling and grouping. Of a process: {host * 1e3:.2g} ms to read and write, as measured. P processes take "
        f"max(card, (card + process) / P) an object.\n"
    )
    errors = [
        [name, f"{error['all']:.1e}", f"{error['worst']:.1e}"] for name, error in content["precision"]["errors"].items()
    ]
    parts.append(table(["relative L2 error of Q-Former features", "all objects", "worst object"], errors))
    close = content["precision"]
    parts.append(
        f"{close['stage']}, {close['objects']} objects, against float32. The nearest other object is "
        f"{close['nearest_other_object']:.2g} away (median, same unit).\n"
    )
    return "\n".join(parts)
