"""Files of answers, judged: which questions, which prompts, our score and PointLLM's count.

The score counts an unusable reply once, as wrong. `protocol` in the result holds what PointLLM's evaluator counts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointalign import storage
from pointalign.data.dataset import CLASSES
from pointalign.evaluation import protocol
from pointalign.evaluation.judge import JudgeOptions, build_judge, judge_cases, summary
from pointalign.evaluation.judge_prompts import Case
from pointalign.evaluation.local_judges import Judge
from pointalign.evaluation.tasks import PROMPTS as QUESTIONS


def judge_file(answers: Path, kind: str, options: JudgeOptions, families: Sequence[str] | None = None) -> str:
    """Judge a file in PointLLM's format and write `<name>.judged.json` beside it. Returns a summary line.

    Args:
        families: the cluster of each answer, for the interval; by default each object is a cluster.
    """
    if options.model is None:
        raise ValueError("name a judge: --judge.model NAME --judge.base_url URL, --judge.model FOLDER, or string")
    content = json.loads(answers.read_text(encoding="utf-8-sig"))
    results, classes = _rows(content, answers), CLASSES if kind == "class" else ()
    if not classes and (
        numbers := [row["ground_truth"] for row in results if not isinstance(row["ground_truth"], str)]
    ):
        raise ValueError(
            f"{answers}: ground_truth {numbers[0]} is no text; for answers about ModelNet40 add --kind class"
        )
    labels = [_class_of(row) if classes else str(row.get("label_name") or "") for row in results]
    if classes and (unknown := sorted(set(labels) - set(classes))):
        raise ValueError(f"{answers}: {unknown[0]!r} is not a class of ModelNet40")
    cases = [
        Case(label if classes else str(row["ground_truth"]), row["model_output"], label, classes)
        for row, label in zip(results, labels, strict=True)
    ]
    judge = build_judge(options)
    judged = judge_cases(judge, kind, cases, answers.parent / "judge-replies.jsonl")
    result = summary(judged, families or [str(row["object_id"]) for row in results])
    rows = [
        row | {"reply": reply, "verdict": value}
        for row, reply, value in zip(results, judged.replies, judged.values, strict=True)
    ]
    written = answers.with_name(f"{answers.stem}.judged.json")
    differs = differences(str(content.get("prompt", "")), kind, judge)
    published = protocol.counts(kind, judged.replies, cases)
    described = {
        "judge": judge.name,
        "kind": kind,
        "asked": content.get("prompt"),
        "judge_prompt": _described(judge, kind),
    }
    described |= {"differs_from_paper": differs, "protocol": published}
    storage.write_json(written, described | result | {"results": rows})
    score, usage = result["score"], result["usage"]
    names = [name for name in ("accuracy", "clean_accuracy", "average_score") if name in published]
    counted = ", ".join(f"{name.replace('_', ' ')} {published[name]:.2f}" for name in names)
    return (
        f"{kind} judged by {judge.name}: {100 * score['mean']:.1f} "
        f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}] over {score['count']} answers, "
        f"{result['invalid']} unusable replies (counted as 0); {usage['requests']} requests, "
        f"{usage['retries']} retries, {usage['prompt_tokens']} + {usage['completion_tokens']} tokens\n"
        f"as PointLLM's evaluator counts: {counted}, {published['invalid_responses']} invalid replies\n"
        f"differs from the published protocol: {'; '.join(differs)}\nwritten: {written}"
    )


def _described(judge: Judge, kind: str) -> dict[str, str] | None:
    """Which prompt a judge was asked with; None for rules."""
    if judge.prompts is None:
        return None
    return {"prompt": judge.prompts.described(kind), "sha256": judge.prompts.sha256(kind)}


def _rows(content: Any, path: Path) -> list[dict[str, Any]]:
    """The results of an answer file, of this program or PointLLM's."""
    rows = content.get("results") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path}: expected {{"prompt": ..., "results": [...]}} with at least one result')
    for number, row in enumerate(rows):
        for name in ("object_id", "ground_truth", "model_output"):
            if not isinstance(row, dict) or name not in row:
                raise ValueError(f"{path}: result {number} lacks {name!r}")
    return rows


def _class_of(row: dict[str, Any]) -> str:
    """The class's name: `label_name`, or in PointLLM's files without it the index in `ground_truth`."""
    name, truth = row.get("label_name"), row["ground_truth"]
    if not name and isinstance(truth, int) and 0 <= truth < len(CLASSES):
        return CLASSES[truth]
    return str(name or truth).replace("_", " ")


def differences(prompt: str, kind: str, judge: Judge) -> list[str]:
    """What makes a score differ from PointLLM's table: the judge's prompt, the question, unusable replies.

    Args:
        prompt: the question that was answered.
    """
    numbers = {text.strip(): number for number, text in enumerate(QUESTIONS)}
    number = numbers.get(prompt.strip())
    expected = (2,) if kind == "caption" else (0, 1)
    asked = f"another question, {prompt!r:.80}" if number is None else f"PointLLM's question {number}"
    reasons = ["the judge answers at temperature 0, the published at 1"]
    if judge.prompts is None:
        reasons = ["the judge is a set of rules, no language model"]
    elif judge.prompts.owner(kind) is None:
        reasons.append(f"the judge's {kind} prompt is {judge.prompts.described(kind)}")
    if number not in expected:
        reasons.append(f"the answers are to {asked}, published are {' and '.join(map(str, expected))}")
    return [*reasons, "an unusable reply counts as 0 in the first line"]


def judge_tasks(folder: Path, evaluation: dict[str, Any], options: JudgeOptions) -> str:
    """Judge the answers of an evaluation: names as objects (as classes for ModelNet40), captions by score."""
    kinds = {"classification": "object", "modelnet40": "class", "captioning": "caption"}
    lines = []
    for name, task in evaluation["tasks"].items():
        if task["kind"] in kinds:
            families = [question["family"] for question in task["questions"]]
            lines.append(judge_file(folder / f"{name}.json", kinds[task["kind"]], options, families))
    return "\n".join(lines)
