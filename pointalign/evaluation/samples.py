"""A first look at a model: ten questions about held-out objects, with answers and truths."""

import numpy as np

from pointalign.data.captions import conversations
from pointalign.evaluation.naming import QUESTION, Objects, ask
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor


def ask_ten(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, objects: Objects, seed: int = 0
) -> str:
    """A Markdown table; objects from different families, every other one asked about geometry or colour."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(objects.records))
    _, first = np.unique([objects.families[i] for i in order], return_index=True)
    chosen = order[np.sort(first)][:10]
    questions, truths = [], []
    for place, index in enumerate(chosen):
        entries = conversations(objects.records[index])
        kind = "simple_description" if place % 2 == 0 else "single_round"
        turns = next(entry for entry in entries if entry["conversation_type"] == kind)["conversations"]
        questions.append(QUESTION if place % 2 == 0 else turns[0]["value"].removeprefix("<point>\n"))
        truths.append(turns[1]["value"])
    answers = ask(model, processor, [objects.clouds[i] for i in chosen], questions, description="sample answers")
    rows = ["| question | answer | truth |", "|---|---|---|"]
    rows += [f"| {q} | {a} | {t} |" for q, a, t in zip(questions, answers, truths, strict=True)]
    return "\n".join(rows) + "\n"
