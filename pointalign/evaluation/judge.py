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
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from pointalign import storage
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
        with storage.replacing(path) as temporary:
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
    from pointalign.evaluation.judge import build_judge

    judge = build_judge(options)
    judged = judge_cases(judge, kind, cases, answers.parent / "judge-replies.jsonl")
    one = summary(judged, [case.family for case in cases], options)
    rows = [
        row | {"reply": reply, "verdict": value}
        for row, reply, value in zip(results, judged.replies, judged.values, strict=True)
    ]
    written = answers.with_name(f"{answers.stem}.judged.json")
    storage.write_json(
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


class EndpointJudge:
    """An OpenAI-compatible endpoint, asked at temperature 0 with a fixed seed.

    Too many requests, server errors, timeouts, broken connections and replies that are not the protocol's JSON are
    tried again after a growing pause (or as long as `Retry-After` says); anything else, such as a wrong key, ends the
    run.
    """

    def __init__(self, options: JudgeOptions):
        import os

        import openai

        self.options = options
        self.name = f"{options.base_url} {options.model}"
        self.workers = options.concurrency
        self.usage = Usage()
        self._lock = threading.Lock()
        key = os.environ.get(options.key_variable, "none")
        self.client = openai.OpenAI(base_url=options.base_url, api_key=key, timeout=options.timeout, max_retries=0)

    def reply(self, kind: str, case: Case) -> str:
        import openai

        waits = [self.options.pause * 2**attempt for attempt in range(self.options.attempts - 1)]
        for wait in [*waits, None]:
            try:
                return self._once(kind, case)
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                failure: Exception = error
                response = getattr(error, "response", None)
                asked = response.headers.get("retry-after", "") if response is not None else ""
                if wait is not None and re.fullmatch(r"\d+(\.\d+)?", asked):
                    wait = min(float(asked), 60.0)
            except (openai.APIResponseValidationError, json.JSONDecodeError, _Malformed) as error:
                failure = error
            except openai.APIStatusError as error:
                raise JudgeFailure(f"{self.name} refuses: {error.status_code} {error.message}") from error
            if wait is None:
                raise JudgeFailure(
                    f"{self.name}: no reply after {self.options.attempts} attempts: {failure}"
                ) from failure
            with self._lock:
                self.usage.retries += 1
            time.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, kind: str, case: Case) -> str:
        response = self.client.chat.completions.create(
            model=str(self.options.model),
            messages=[{"role": "user", "content": case.prompt(kind)}],
            temperature=0,
            seed=0,
            max_tokens=64,
        )
        try:
            text = response.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise _Malformed(f"the response holds no message: {str(response)[:200]}") from error
        if not isinstance(text, str):
            raise _Malformed(f"the message holds no text: {str(response)[:200]}")
        with self._lock:
            self.usage.requests += 1
            if response.usage is not None:
                self.usage.prompt_tokens += response.usage.prompt_tokens
                self.usage.completion_tokens += response.usage.completion_tokens
        return text


class _Malformed(ValueError):
    pass


class LocalJudge:
    """A causal language model from a local folder, greedy."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        weights = storage.file_hash(folder / "config.json", *sorted(folder.glob("*.safetensors")))[:16]
        self.name = f"local {folder.name} {weights}"  # replies are kept under it: two folders may share a name
        self.workers = 1
        self.usage = Usage()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)  # type: ignore[arg-type]

    def reply(self, kind: str, case: Case) -> str:
        import torch

        messages = [{"role": "user", "content": case.prompt(kind)}]
        batch = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        with torch.inference_mode():
            generated = self.model.generate(**batch, max_new_tokens=48, do_sample=False)  # type: ignore[operator]
        new = generated[0, batch["input_ids"].shape[1] :]
        self.usage.requests += 1
        self.usage.prompt_tokens += batch["input_ids"].shape[1]
        self.usage.completion_tokens += len(new)
        return self.tokenizer.decode(new, skip_special_tokens=True)


class StringJudge:
    """Rules in place of a model: the label's head noun in the answer, else the nearest in sentence embedding.

    `object`: T if the answer's head noun is the label's, or either text's noun occurs in the other, or the cosine of
    the two nouns is at least 0.8. `class`: the class whose name occurs in the answer (the longest), else the nearest by
    cosine. `caption`: 100 times the cosine of both texts, negative cosines as 0.
    """

    def __init__(self, sentence_encoder: Path):
        self.name = f"string 1 {sentence_encoder.name}"
        self.workers = 1
        self.usage = Usage()
        self.folder = sentence_encoder
        self.embeddings: dict[str, Any] = {}

    def prepare(self, kind: str, cases: Sequence[Case]) -> None:
        """Embed all texts in one go."""
        from pointalign.evaluation.metrics import embed
        from pointalign.evaluation.naming import head_noun

        texts = {case.answer for case in cases} | {name for case in cases for name in case.classes}
        texts |= {case.truth for case in cases}
        texts |= {head_noun(text) or text for case in cases for text in (case.answer, case.label or case.truth)}
        missing = sorted(text for text in texts if text not in self.embeddings)
        if missing:
            self.embeddings |= dict(zip(missing, embed(self.folder, missing), strict=True))

    def cosine(self, a: str, b: str) -> float:
        return float(self.embeddings[a] @ self.embeddings[b])

    def reply(self, kind: str, case: Case) -> str:
        from pointalign.evaluation.naming import head_noun

        words = f" {' '.join(re.findall('[a-z0-9]+', case.answer.lower()))} "
        if kind == "caption":
            return f"{round(100 * max(0.0, self.cosine(case.answer, case.truth)))}#cosine of the two texts"
        if kind == "class":
            said = [name for name in case.classes if f" {name} " in words]
            best = max(said, key=len) if said else max(case.classes, key=lambda name: self.cosine(name, case.answer))
            return f"{case.classes.index(best)}#{best}#{'named' if said else 'nearest by cosine'}"
        ours, theirs = (head_noun(text) or text for text in (case.answer, case.label or case.truth))
        reference = f" {' '.join(re.findall('[a-z0-9]+', case.truth.lower()))} "
        if ours and (ours == theirs or f" {ours.lower()} " in reference or f" {theirs.lower()} " in words):
            return "T#the noun is the same"
        near = self.cosine(ours, theirs)
        return f"{'T' if near >= 0.8 else 'F'}#cosine of the nouns {near:.2f}"


def build_judge(options: JudgeOptions) -> Judge:
    if options.base_url is not None:
        return EndpointJudge(options)
    if options.model == "string":
        from pointalign import assets

        return StringJudge(assets.sentence_encoder())
    folder = Path(str(options.model))
    if not (folder / "config.json").exists():
        raise ValueError(
            f"--judge.model {options.model}: expected `string`, or a folder with a language model in it; a model's "
            f"name needs --judge.base_url, the endpoint that serves it"
        )
    return LocalJudge(folder)
