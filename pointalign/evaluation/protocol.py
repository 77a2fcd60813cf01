"""The published evaluation protocols: how answers are generated and written, and what is counted of a judge's replies.

`pointllm` is that of PointLLM (Xu et al., ECCV 2024, pointllm/eval), `minigpt3d` that of MiniGPT-3D's fork of it, with
which the published figures of MiniGPT-3D and PointAlign were made. `greedy` is ours: the same answer on every run.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pointalign.data.dataset import CLASSES
from pointalign.evaluation.judge_prompts import Case
from pointalign.evaluation.tasks import Task

END = "###"  # ends an answer of the published checkpoints


@dataclass(frozen=True)
class Protocol:
    """How answers are generated and processed.

    Attributes:
        decoding: options of `generate`.
        limits: kind of task -> most new tokens.
        limit: of the kinds that are not in `limits`; None leaves it to `decoding`.
        process: generated text -> answer.
    """

    decoding: dict[str, Any]
    process: Callable[[str], str]
    limits: dict[str, int] = field(default_factory=dict)
    limit: int | None = None

    def arguments(self, kind: str, max_new_tokens: int | None = None) -> dict[str, Any]:
        """Options of `generate` for a task of this kind; `max_new_tokens` replaces the protocol's limit."""
        limit = max_new_tokens or self.limits.get(kind, self.limit)
        if limit is None:
            return dict(self.decoding)
        return {name: value for name, value in self.decoding.items() if name != "max_length"} | {
            "max_new_tokens": limit
        }


def _until_end(text: str) -> str:
    return text.split(END)[0].strip()


def _as_minigpt3d(text: str) -> str:
    """The fork's processing, in its order. It splits at "Assistant:" after it has put the text in lower case, so that
    nothing is ever split there; the published figures were made so.
    """
    text = text.split("</s>")[0].replace("<s>", "").split("[/INST]")[-1].strip()
    text = text.lower().replace("<unk>", "").strip()
    return text.split(END)[0].split("Assistant:")[-1].strip()


PROTOCOLS = {
    "greedy": Protocol(
        {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None},
        _until_end,
        {"classification": 32, "captioning": 96, "modelnet40": 32, "geometry": 16, "yesno": 16},
    ),
    "pointllm": Protocol(
        {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_length": 2048},
        _until_end,
    ),
    "minigpt3d": Protocol(
        {"do_sample": True, "num_beams": 2, "temperature": 0.2, "top_k": 50, "top_p": 0.7, "min_new_tokens": 10},
        _as_minigpt3d,
        {"modelnet40": 100},
        150,
    ),
}


def output(task: Task, texts: Sequence[str]) -> dict[str, Any]:
    """The answers in the format that PointLLM's evaluator reads.

    Of ModelNet40, `object_id` is the row and `ground_truth` the index of the class, both integers, and `label_name` the
    class. Of other tasks they are the object's name (or a list of names), the reference text and the noun. Under the
    controls, `object_id` is still the object that is asked about, not the one that is shown.
    """
    results = []
    for question, text in zip(task.questions, texts, strict=True):
        if task.kind == "modelnet40":
            object_id, truth = int(question.id), CLASSES.index(question.label)
        else:
            asked = (question.id,) if task.kind == "classification" else question.object_ids
            object_id, truth = asked[0] if len(asked) == 1 else list(asked), question.truth
        results.append(
            {"object_id": object_id, "ground_truth": truth, "model_output": text, "label_name": question.label}
        )
    return {"prompt": task.prompt, "results": results}


# -- what PointLLM's evaluator counts of a judge's replies -------------------------------------------------------------


def tolerant_verdict(kind: str, reply: str) -> int | None:
    """A judge's reply as PointLLM's evaluator reads it; None where it counts as invalid.

    Returns:
        `object`: 1 if the reply's first letter is T, 0 if it is F; `class`: the index of a class; `caption`: 0 to 100.
        The number may stand anywhere before a `#`, so that "87.5#" is read as 5.
    """
    reply = reply.strip()
    if kind == "object":
        return {"T": 1, "F": 0}.get(reply[:1].upper())
    match = re.search(r"\d+#[^#]*#.*$" if kind == "class" else r"\d*#.*", reply)
    first, *rest = (match[0] if match else reply).strip().split("#")
    try:
        number = int(first)
    except ValueError:
        return None
    if kind == "class":
        return number if 0 <= number < len(CLASSES) and rest[:1] != ["NA"] else None
    return number if 0 <= number <= 100 else None


def counts(kind: str, replies: Sequence[str], cases: Sequence[Case]) -> dict[str, Any]:
    """The figures that PointLLM's evaluator prints, in percent, under its names.

    Invalid replies are left out of `accuracy` (`object`) and `average_score` (`caption`). In a `class` case a random
    class takes their place (seed 0, in the order of the answers); `clean_accuracy` leaves them out.

    `minigpt3d` holds the figures of MiniGPT-3D's fork, whose threads count an invalid reply of `object` and `class`
    twice.
    """
    rng = random.Random(0)
    correct, lucky, invalid = 0.0, 0, 0
    for reply, case in zip(replies, cases, strict=True):
        number = tolerant_verdict(kind, reply)
        guessed = number is None
        invalid += guessed
        if kind == "class":
            number = rng.choice(range(len(CLASSES))) if number is None else number
            right = int(number == case.classes.index(case.label))
            lucky += right and guessed
            correct += right
        else:
            correct += number or 0
    total = len(replies)

    def share(right: float, left_out: int, scale: float = 100) -> float:
        return scale * right / (total - left_out) if total != left_out else 0.0

    numbers = {"total_predictions": total, "invalid_responses": invalid}
    if kind == "caption":
        average = share(correct, invalid, 1)
        return {"average_score": average, "total_score": correct} | numbers | {"minigpt3d": {"average_score": average}}
    numbers["correct_predictions"] = int(correct)
    if kind == "object":
        twice = {"accuracy": share(correct, 2 * invalid)}
        return {"accuracy": share(correct, invalid)} | numbers | {"minigpt3d": twice}
    accuracy = share(correct, 0) if total != invalid else 0.0  # theirs is 0 where no reply is valid
    clean = correct - lucky
    return (
        {"accuracy": accuracy, "clean_accuracy": share(clean, invalid)}
        | numbers
        | {"invalid_correct_predictions": lucky}
        | {"minigpt3d": {"accuracy": accuracy, "clean_accuracy": share(clean, 2 * invalid)}}
    )
