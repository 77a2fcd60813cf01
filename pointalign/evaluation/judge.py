"""Answers judged: by any OpenAI-compatible endpoint, by a local model, or by rules that need neither.

Three kinds of verdict, as in PointLLM's protocol: do answer and truth name the same `object` (T or F), which `class` of
a closed list does the answer name (an index), how well does a `caption` say what the truth says (0 to 100). The prompts
are this project's own and pinned: their version is part of the key under which a reply is kept. An unusable reply is
counted once, as wrong, and reported; it never becomes a random guess.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from pointalign import checkpointing
from pointalign.evaluation.statistics import cluster_mean

PROMPT_VERSION = "1"
KINDS = ("object", "class", "caption")
PROMPTS = {
    "object": (
        "Two texts each describe one 3D object.\nReference: {truth}\nAnswer: {answer}\n"
        "Do both name the same kind of object? Ignore colour, material, style and any further detail. A more general "
        "or a more special name counts if it can mean the same thing.\n"
        "Reply in one line: T#short reason, if they do; F#short reason, if not."
    ),
    "class": (
        "Classes, by index:\n{classes}\nAnswer: {answer}\n"
        "Which class does the answer describe best? If it fits none of them, reply -1.\n"
        "Reply in one line: index#class#short reason."
    ),
    "caption": (
        "A reference caption of a 3D object and a caption to be rated.\nReference: {truth}\nCaption: {answer}\n"
        "Which share of what the reference says (kind of object, parts, colours, shape, use) does the caption state "
        "correctly? Near synonyms count, contradictions do not.\n"
        "Reply in one line: a whole number from 0 (nothing) to 100 (everything)#short reason."
    ),
}


@dataclass
class JudgeOptions:
    """Who judges (`--judge.*`); nobody by default.

    Attributes:
        base_url: an OpenAI-compatible endpoint; its key is read from the environment variable `key_variable`.
        model: name of the model there; without `base_url`, folder of a local causal language model, or `string` for the
            rules of `StringJudge`.
        concurrency: requests at a time.
        timeout: seconds until a request counts as failed.
        attempts: requests per answer; the pause between them doubles from `pause` seconds.
        input_price, output_price: currency units per million tokens, for the cost that is printed.
        key_variable: of the endpoint's key.
    """

    base_url: str | None = None
    model: str | None = None
    concurrency: int = 4
    timeout: float = 60.0
    attempts: int = 6
    pause: float = 1.0
    input_price: float = 0.0
    output_price: float = 0.0
    key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if self.base_url and not self.model:
            raise ValueError("--judge.base_url needs --judge.model, the model's name at that endpoint")

    @property
    def chosen(self) -> bool:
        return self.model is not None


class JudgeFailure(OSError):
    """An endpoint gave no reply to some answers; those that came are kept, and the same command asks for the rest."""


@dataclass(frozen=True)
class Case:
    """One answer to judge; `classes` is the closed list of a `class` case."""

    truth: str
    answer: str
    label: str = ""
    family: str = ""
    classes: tuple[str, ...] = ()

    def prompt(self, kind: str) -> str:
        listed = "\n".join(f"{index}: {name}" for index, name in enumerate(self.classes))
        return PROMPTS[kind].format(truth=self.truth, answer=self.answer, classes=listed)


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    retries: int = 0


class Judge(Protocol):
    """What judges: `name` identifies it among kept replies, `workers` says how many cases it takes at a time."""

    name: str
    workers: int
    usage: Usage

    def reply(self, kind: str, case: Case) -> str: ...


def verdict(kind: str, reply: str, case: Case) -> float | None:
    """A reply as a number in 0..1, None if it cannot be used.

    `object`: `T#...` or `F#...`; `class`: `index#...`, right where the index is the label's; `caption`: `score#...`.
    """
    opening = reply.strip().partition("#")[0].strip().strip(".\"'`*")
    if kind == "object":
        return {"T": 1.0, "F": 0.0, "TRUE": 1.0, "FALSE": 0.0}.get(opening.upper())
    if not re.fullmatch(r"-?\d{1,4}", opening):
        return None
    number = int(opening)
    if kind == "class":
        return float(number == case.classes.index(case.label)) if -1 <= number < len(case.classes) else None
    return number / 100 if 0 <= number <= 100 else None


@dataclass
class Judged:
    """Replies and verdicts of all cases; `values` is None where a reply could not be used."""

    replies: list[str]
    values: list[float | None]
    usage: Usage = field(default_factory=Usage)

    @property
    def invalid(self) -> int:
        return sum(value is None for value in self.values)


def judge_cases(judge: Judge, kind: str, cases: Sequence[Case], kept: Path) -> Judged:
    """Judge every case once; replies are appended to `kept` as they come, and those already there are not asked again.

    Raises:
        JudgeFailure: some got no reply; the others are kept.
    """
    if kind not in KINDS:
        raise ValueError(f"judge of kind {kind!r}: expected of {', '.join(KINDS)}")
    known = _read_replies(kept)
    keys = [_key(judge.name, kind, case) for case in cases]
    pending = {key: case for key, case in zip(keys, cases, strict=True) if key not in known}
    prepare: Callable | None = getattr(judge, "prepare", None)
    if prepare is not None and pending:
        prepare(kind, list(pending.values()))
    kept.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()
    failures: list[JudgeFailure] = []
    progress = tqdm(total=len(pending), desc="judging", unit="reply", leave=False)

    def ask(item: tuple[str, Case]) -> None:
        if len(failures) > judge.workers:  # the endpoint is down: no use in waiting for every answer's last attempt
            return
        key, case = item
        try:
            reply = judge.reply(kind, case)
        except JudgeFailure as failure:
            failures.append(failure)
            return
        with lock, kept.open("a") as file:
            file.write(json.dumps({"key": key, "reply": reply}) + "\n")
            known[key] = reply
            progress.update()

    with ThreadPoolExecutor(judge.workers) as pool:
        list(pool.map(ask, pending.items()))
    progress.close()
    if failures:
        missing = sum(key not in known for key in pending)
        raise JudgeFailure(f"{missing} of {len(cases)} answers got no reply; the rest is kept: {failures[0]}")
    replies = [known[key] for key in keys]
    values = [verdict(kind, reply, case) for reply, case in zip(replies, cases, strict=True)]
    return Judged(replies, values, judge.usage)


def _key(name: str, kind: str, case: Case) -> str:
    parts = [name, PROMPT_VERSION, kind, case.prompt(kind), case.label]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read_replies(path: Path) -> dict[str, str]:
    """What an earlier run kept; a last line that was cut short is dropped."""
    text = path.read_text() if path.exists() else ""
    *lines, torn = text.split("\n")
    if torn:
        with checkpointing.replacing(path) as temporary:
            temporary.write_text(text.removesuffix(torn))
    return {entry["key"]: entry["reply"] for entry in map(json.loads, lines)}


def summary(judged: Judged, families: Sequence[str], options: JudgeOptions) -> dict[str, Any]:
    """Mean with interval (an unusable reply counts as 0, once), the number of such replies, and what it cost."""
    usage = judged.usage
    cost = (usage.prompt_tokens * options.input_price + usage.completion_tokens * options.output_price) / 1e6
    counted = [value or 0.0 for value in judged.values]
    return {
        "score": cluster_mean(counted, families).as_dict(),
        "invalid": judged.invalid,
        "usage": {"requests": usage.requests, "retries": usage.retries, "prompt_tokens": usage.prompt_tokens,
                  "completion_tokens": usage.completion_tokens, "cost": round(cost, 6)},
    }  # fmt: skip


def described(kind: str, judge: Judge, one: dict[str, Any]) -> str:
    score, usage = one["score"], one["usage"]
    return (
        f"{kind} judged by {judge.name}: {100 * score['mean']:.1f} "
        f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}] "
        f"over {score['count']} answers, {one['invalid']} unusable replies (counted once, as 0); {usage['requests']} "
        f"requests, {usage['retries']} retries, {usage['prompt_tokens']} + {usage['completion_tokens']} tokens, "
        f"cost {usage['cost']:.4f}"
    )


def judge_file(answers: Path, kind: str, options: JudgeOptions, families: Sequence[str] | None = None) -> str:
    """Judge a file in PointLLM's format; writes `<name>.judged.json` beside it and says what came out.

    Args:
        families: the cluster of each answer, for the interval; by default every object is its own.
    """
    if not options.chosen:
        raise ValueError(
            "no judge was named: --judge.base_url URL --judge.model NAME, or --judge.model FOLDER, or string"
        )
    results = json.loads(answers.read_text())["results"]
    classes: tuple[str, ...] = ()
    if kind == "class":
        from pointalign.data.modelnet import CLASSES

        classes = CLASSES
        if unknown := sorted({row["label_name"] for row in results} - set(classes)):
            raise ValueError(f"{answers}: {unknown[0]!r} is no class of ModelNet40")
    families = families or [str(row["object_id"]) for row in results]
    cases = [
        Case(row["ground_truth"], row["model_output"], row.get("label_name", ""), family, classes)
        for row, family in zip(results, families, strict=True)
    ]
    from pointalign.evaluation.judges import build_judge

    judge = build_judge(options)
    judged = judge_cases(judge, kind, cases, answers.parent / "judge-replies.jsonl")
    one = summary(judged, [case.family for case in cases], options)
    rows = [
        row | {"reply": reply, "verdict": value}
        for row, reply, value in zip(results, judged.replies, judged.values, strict=True)
    ]
    written = answers.with_name(f"{answers.stem}.judged.json")
    checkpointing.write_json(
        written, {"judge": judge.name, "prompt_version": PROMPT_VERSION, "kind": kind} | one | {"results": rows}
    )
    return f"{described(kind, judge, one)}\nwritten: {written}"


def judge_tasks(folder: Path, evaluation: dict[str, Any], options: JudgeOptions) -> str:
    """Judge the answers of an evaluation: names as objects (as classes for ModelNet40), captions by score."""
    kinds = {"classification": "object", "modelnet40": "class", "captioning": "caption"}
    lines = [
        judge_file(folder / f"{name}.json", kinds[task["kind"]], options, [one["family"] for one in task["questions"]])
        for name, task in evaluation["tasks"].items()
        if task["kind"] in kinds
    ]
    return "\n".join(lines)
