"""The dozen objects that the page offers: held out from every training, two of them of a kind that no training had."""

import json
from pathlib import Path

import numpy as np

from pointalign.evaluation.report import render
from pointalign.page.intake import Item

EXAMPLES = (
    "blend-swap-cc-0-armchair", "scopia-coconuttree", "kator-legaz-concept-sedan-01v1", "blend-swap-cc-0-desklamp",
    "kator-legaz-mid-century-bench-sofa", "blend-swap-cc-0-horse2", "scopia-office-chair",
    "blend-swap-cc-by-lettocloud", "blend-swap-cc-0-table-football", "kator-legaz-exterior-door-01",
    "blend-swap-cc-0-motorbike", "blend-swap-cc-by-tulips",
)  # fmt: skip
THUMBNAIL = 144  # pixels


def load_examples(folder: Path) -> list[Item]:
    """The examples of the embedded objects, with creator and licence as a note.

    Args:
        folder: as `pointalign.assets.embedded_objects` returns it.
    """
    records = {r["object_id"]: r for r in json.loads((folder / "objects.json").read_text(encoding="utf-8"))}
    items = []
    for name in EXAMPLES:
        record = records[name]
        points = np.load(folder / "clouds" / f"{name}_8192.npy")
        items.append(Item(record["name"], points, (f"by {record['creator']}, {record['license']}",)))
    return items


def thumbnail(item: Item) -> np.ndarray:
    """`[THUMBNAIL, THUMBNAIL, 3]` uint8, seen from the front right and above."""
    return render(item.points, THUMBNAIL)[:, 2 * THUMBNAIL :]
