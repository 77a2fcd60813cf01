"""An audit from a model's name to its files: the journal of replies, the measures, the report."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pointalign import build, storage
from pointalign.audit import adapter as adapters
from pointalign.audit import measures, plan, report
from pointalign.audit.adapter import Adapter
from pointalign.audit.plan import Ask, Plan
from pointalign.embedded.facts import main_colour
from pointalign.evaluation import probe, statistics
from pointalign.evaluation.answering import JOURNAL, Journal
from pointalign.evaluation.tasks import ObjectSet

RESULT, REPORT = "audit.json", "audit.html"
ENCODED_TOGETHER = 16  # clouds of a call of `states`


@dataclass
class AuditOptions:
    """What is audited, and how.

    Attributes:
        adapter: `pointalign`, `pointllm`, or a Python file, see `pointalign.audit.adapter`.
        objects: `furniture`, the embedded objects, or `procedural`, which need no download.
        quick: ask a quarter.
        seed: of pairs, perturbations and noise.
        batch_size: questions answered together; it belongs to the definition of an audit, as padding can change the
            last bits.
        output: folder of the journal, the result and the report.
    """

    adapter: str = "pointalign"
    objects: str = "furniture"
    quick: bool = False
    seed: int = 0
    batch_size: int = 16
    output: str = "runs/audit"


def audit(model: str | None, options: AuditOptions) -> dict[str, Any]:
    """Ask, measure and write `audit.json` and `audit.html`; returns the content of the first.

    A stopped audit goes on with the same command: replies are written as they come.

    Raises:
        ValueError: options or the adapter's replies do not fit, or the folder holds another audit.
    """
    began = time.perf_counter(), time.process_time()
    adapter = adapters.find(options.adapter)
    if model is None and options.adapter != "pointalign":
        raise ValueError(f"--adapter {options.adapter} needs MODEL, what its load() takes")
    name = model or build.default_model()
    size = plan.QUICK if options.quick else plan.FULL
    planned = plan.make(options.objects, size, options.seed)
    loaded = adapter.load(name)
    asked = {key: value for key, value in asdict(options).items() if key != "output"}
    definition = {
        "model": Path(name).name,
        "weights": getattr(loaded, "weights", None),
        "asked": asked | {"adapter": adapter.name},
        "size": asdict(size),
    }
    folder = Path(options.output)
    journal = Journal(folder / JOURNAL, definition)
    resumed = len(journal.done) > 0
    asks = planned.asks()
    replies = ask_all(adapter, loaded, planned, asks, options.batch_size, journal)
    result = definition | measures.measure(planned, replies)
    result["retention"] = None
    if adapter.states is not None:
        result["retention"] = journal.get("retention", lambda: retention(adapter, loaded, planned))
    result["questions"] = len(asks)
    result["pictures"] = examples(planned, replies)
    result["seconds"] = {
        "wall": round(time.perf_counter() - began[0], 1),
        "cpu": round(time.process_time() - began[1], 1),
        "resumed": resumed,
    }
    result["provenance"] = storage.provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    storage.write_json(folder / RESULT, result)
    (folder / REPORT).write_text(report.page(result, planned.clouds), encoding="utf-8")
    return result


def ask_all(
    adapter: Adapter, loaded: Any, planned: Plan, asks: list[Ask], batch_size: int, journal: Journal
) -> measures.Replies:
    """Replies to all questions, batch by batch through the journal."""
    replies: measures.Replies = {}
    for start in tqdm(range(0, len(asks), batch_size), desc="questions", unit="batch", leave=False):
        batch = asks[start : start + batch_size]

        def compute(batch: list[Ask] = batch) -> list[dict[str, Any]]:
            return adapter.reply(
                loaded,
                [ask.item.text for ask in batch],
                [planned.clouds(ask.cloud) for ask in batch],
                [list(ask.candidates) for ask in batch],
            )

        for ask, reply in zip(batch, journal.get(f"replies/{start}", compute), strict=True):
            scores = None if reply["scores"] is None else dict(zip(ask.candidates, reply["scores"], strict=True))
            replies[ask.cloud, ask.item.text] = reply | {"scores": scores}
    return replies


# -- retention by layer ------------------------------------------------------------------------------------------------


def properties(objects: ObjectSet) -> dict[str, list]:
    """What a linear probe reads of each object; None where it is not clear."""
    return {
        "main colour": [main_colour(record) for record in objects.records],
        "height over width": [float(np.log(record["height"] / record["width"])) for record in objects.records],
        "noun": list(objects.labels),
    }


def retention(adapter: Adapter, loaded: Any, planned: Plan) -> dict[str, Any]:
    """What linear probes read of the point tokens' mean state at each place, fitted on other objects.

    Returns: `kinds`, property -> `accuracy` or `R2`; `probes`, property -> place -> estimate.
    """
    assert adapter.states is not None
    training, held_out = planned.probes
    read = []
    for objects in (training, held_out):
        parts = [
            adapter.states(loaded, [np.asarray(objects.cloud(name), dtype=np.float32) for name in part])
            for start in range(0, len(objects.ids), ENCODED_TOGETHER)
            if (part := objects.ids[start : start + ENCODED_TOGETHER])
        ]
        read.append({place: np.concatenate([part[place] for part in parts]) for place in parts[0]})
    fitted, tested = properties(training), properties(held_out)
    result: dict[str, Any] = {"kinds": {}, "probes": {}}
    for name, values in fitted.items():
        categorical = probe.categorical(values)
        known = {value for value in values if value is not None}
        rows = [i for i, value in enumerate(values) if value is not None]
        test_rows = [
            i for i, value in enumerate(tested[name]) if value is not None and (value in known or not categorical)
        ]
        if len(rows) < 2 or len(test_rows) < 2:
            continue
        truths = [tested[name][i] for i in test_rows]
        families = [held_out.families[i] for i in test_rows]
        result["kinds"][name] = "accuracy" if categorical else "R2"
        result["probes"][name] = {}
        for place, states in read[0].items():
            predicted = probe.ridge_predictions(
                states[rows], [values[i] for i in rows], read[1][place][test_rows], categorical
            )
            if categorical:
                right = [float(a == b) for a, b in zip(predicted, truths, strict=True)]
                estimate = statistics.cluster_mean(right, families)
            else:
                pairs = np.array([predicted, truths], dtype=float).T
                estimate = statistics.cluster_statistic(probe.explained_variance, pairs, families)
            result["probes"][name][place] = estimate.as_dict()
    return result


# -- what the report shows of single objects ---------------------------------------------------------------------------


def examples(planned: Plan, replies: measures.Replies, count: int = 6) -> list[dict[str, Any]]:
    """The first flipping pairs of each edit, with both answers."""
    shown = []
    for edit in plan.EDITS:
        pairs = [pair for pair in planned.pairs if pair.edit == edit and pair.flips]
        for pair in [pairs[place] for place in np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)]:
            item = pair.item
            shown.append(
                {
                    "edit": edit,
                    "question": item.text,
                    "clouds": [item.object_id, pair.cloud],
                    "true": [item.label, pair.after],
                    "answers": [replies[name, item.text]["text"] for name in (item.object_id, pair.cloud)],
                    "stated": [
                        measures.stated(item, replies[name, item.text]["text"]) for name in (item.object_id, pair.cloud)
                    ],
                }
            )
    return shown
