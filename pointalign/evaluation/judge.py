"""Judged answers: by an OpenAI-compatible endpoint, by a local language model, or by rules that need neither.

There are three kinds of verdict, as in PointLLM's protocol. `object`: do answer and reference name the same object (T
or F)? `class`: which class of a closed list does the answer name (an index)? `caption`: how much of the reference does
the answer state (0 to 100)? The prompts are this project's and pinned: their version is part of the key under which a
reply is stored. An unusable reply counts once, as wrong, and is reported; it is never replaced by a random guess.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pointalign import assets, storage
from pointalign.data.dataset import CLASSES
from pointalign.evaluation import metrics
from pointalign.evaluation.naming import head_noun
from pointalign.evaluation.statistics import cluster_mean

PROMPT_VERSION = "1"
ATTEMPTS, PAUSE = 6, 1.0  # requests per answer; seconds between the first two, doubled after each
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
    """Who judges (`--judge.*`); without `model`, nothing is judged.

    Attributes:
        base_url: an OpenAI-compatible endpoint; its key is read from the environment variable OPENAI_API_KEY.
        model: the model's name at the endpoint; without `base_url`, the folder of a local causal language model, or
            `string` for the rules of `StringJudge`.
        concurrency: number of simultaneous requests.
        timeout: seconds until a request counts as failed.
    """

    base_url: str | None = None
    model: str | None = None
    concurrency: int = 4
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.base_url and not self.model:
            raise ValueError("--judge.base_url needs --judge.model, the model's name at that endpoint")


class JudgeFailure(OSError):
    """An endpoint gave no reply to some answers; the other replies are stored, and the same command continues."""


@dataclass(frozen=True)
class Case:
    """An answer to judge against a reference text `truth`; `classes` is the closed list of a `class` case."""

    truth: str
    answer: str
    label: str = ""
    classes: tuple[str, ...] = ()

    def prompt(self, kind: str) -> str:
        listed = "\n".join(f"{index}: {name}" for index, name in enumerate(self.classes))
        return PROMPTS[kind].format(truth=self.truth, answer=self.answer, classes=listed)


@dataclass
class Usage:
    """Counts of requests and tokens; a retry is a repeated request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    retries: int = 0


class Judge:
    """Base of the judges: `name` identifies one among stored replies, `workers` is the number of simultaneous cases."""

    def __init__(self, name: str, workers: int = 1):
        self.name, self.workers = name, workers
        self.usage = Usage()

    def prepare(self, kind: str, cases: Sequence[Case]) -> None:
        """Called once, with all cases that lack a reply."""

    def reply(self, kind: str, case: Case) -> str:
        raise NotImplementedError


def verdict(kind: str, reply: str, case: Case) -> float | None:
    """A reply as a number in 0..1, None if it is unusable.

    `object`: `T#...` or `F#...`; `class`: `index#...`, 1 if the index is the label's; `caption`: `score#...`.
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
    """Replies and verdicts (`values`) of all cases; a verdict is None where the reply is unusable."""

    replies: list[str]
    values: list[float | None]
    usage: Usage


def judge_cases(judge: Judge, kind: str, cases: Sequence[Case], stored: Path) -> Judged:
    """Judge every case; each reply is appended to the file `stored` as it comes, and is not asked for again.

    Raises:
        JudgeFailure: some cases got no reply; the other replies are stored.
    """
    if kind not in PROMPTS:
        raise ValueError(f"judge of kind {kind!r}: expected one of {', '.join(PROMPTS)}")
    known = _read_replies(stored)
    keys = [_key(judge.name, kind, case) for case in cases]
    pending = {key: case for key, case in zip(keys, cases, strict=True) if key not in known}
    if pending:
        judge.prepare(kind, list(pending.values()))
    stored.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()
    failures: list[JudgeFailure] = []
    progress = tqdm(total=len(pending), desc="judging", unit="reply", leave=False)

    def ask(item: tuple[str, Case]) -> None:
        if len(failures) > judge.workers:  # the endpoint is down: do not spend every attempt on every answer
            return
        key, case = item
        try:
            reply = judge.reply(kind, case)
        except JudgeFailure as failure:
            failures.append(failure)
            return
        with lock, stored.open("a") as file:
            file.write(json.dumps({"key": key, "reply": reply}) + "\n")
            known[key] = reply
            progress.update()

    with ThreadPoolExecutor(judge.workers) as pool:
        list(pool.map(ask, pending.items()))
    progress.close()
    if failures:
        missing = sum(key not in known for key in pending)
        raise JudgeFailure(f"{missing} of {len(cases)} answers got no reply; the others are stored: {failures[0]}")
    replies = [known[key] for key in keys]
    values = [verdict(kind, reply, case) for reply, case in zip(replies, cases, strict=True)]
    return Judged(replies, values, judge.usage)


def _key(name: str, kind: str, case: Case) -> str:
    parts = [name, PROMPT_VERSION, kind, case.prompt(kind), case.label]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read_replies(path: Path) -> dict[str, str]:
    """Key -> reply of an earlier run; an incomplete last line is removed from the file."""
    text = path.read_text() if path.exists() else ""
    *lines, torn = text.split("\n")
    if torn:
        with storage.replacing(path) as temporary:
            temporary.write_text(text.removesuffix(torn))
    return {entry["key"]: entry["reply"] for entry in map(json.loads, lines)}


def summary(judged: Judged, families: Sequence[str]) -> dict[str, Any]:
    """Mean with interval (an unusable reply counts as 0), the number of unusable replies, and requests and tokens."""
    score = cluster_mean([value or 0.0 for value in judged.values], families).as_dict()
    return {"score": score, "invalid": judged.values.count(None), "usage": asdict(judged.usage)}


def judge_file(answers: Path, kind: str, options: JudgeOptions, families: Sequence[str] | None = None) -> str:
    """Judge a file in PointLLM's format and write `<name>.judged.json` beside it. Returns a summary line.

    Args:
        families: the cluster of each answer, for the interval; by default each object is a cluster.
    """
    if options.model is None:
        raise ValueError("name a judge: --judge.model NAME --judge.base_url URL, --judge.model FOLDER, or string")
    results = json.loads(answers.read_text())["results"]
    classes = CLASSES if kind == "class" else ()
    if classes and (unknown := sorted({row["label_name"] for row in results} - set(classes))):
        raise ValueError(f"{answers}: {unknown[0]!r} is not a class of ModelNet40")
    cases = [Case(row["ground_truth"], row["model_output"], row.get("label_name", ""), classes) for row in results]
    judge = build_judge(options)
    judged = judge_cases(judge, kind, cases, answers.parent / "judge-replies.jsonl")
    result = summary(judged, families or [str(row["object_id"]) for row in results])
    rows = [
        row | {"reply": reply, "verdict": value}
        for row, reply, value in zip(results, judged.replies, judged.values, strict=True)
    ]
    written = answers.with_name(f"{answers.stem}.judged.json")
    described = {"judge": judge.name, "prompt_version": PROMPT_VERSION, "kind": kind}
    storage.write_json(written, described | result | {"results": rows})
    score, usage = result["score"], result["usage"]
    return (
        f"{kind} judged by {judge.name}: {100 * score['mean']:.1f} "
        f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}] over {score['count']} answers, "
        f"{result['invalid']} unusable replies (counted as 0); {usage['requests']} requests, "
        f"{usage['retries']} retries, {usage['prompt_tokens']} + {usage['completion_tokens']} tokens\n"
        f"written: {written}"
    )


def judge_tasks(folder: Path, evaluation: dict[str, Any], options: JudgeOptions) -> str:
    """Judge the answers of an evaluation: names as objects (as classes for ModelNet40), captions by score."""
    kinds = {"classification": "object", "modelnet40": "class", "captioning": "caption"}
    lines = []
    for name, task in evaluation["tasks"].items():
        if task["kind"] in kinds:
            families = [question["family"] for question in task["questions"]]
            lines.append(judge_file(folder / f"{name}.json", kinds[task["kind"]], options, families))
    return "\n".join(lines)


class EndpointJudge(Judge):
    """An OpenAI-compatible endpoint, asked at temperature 0 with a fixed seed.

    A request is repeated after rate limits, server errors, timeouts, broken connections and responses that do not
    follow the protocol, after a growing pause (or the pause that `Retry-After` asks for). Any other error, such as a
    wrong key, ends the run.
    """

    def __init__(self, options: JudgeOptions):
        import openai

        super().__init__(f"{options.base_url} {options.model}", options.concurrency)
        self.model = options.model
        self._lock = threading.Lock()
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=options.base_url, api_key=key, timeout=options.timeout, max_retries=0)

    def reply(self, kind: str, case: Case) -> str:
        import openai

        waits = [PAUSE * 2**attempt for attempt in range(ATTEMPTS - 1)]
        for wait in [*waits, None]:
            try:
                return self._request(kind, case)
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                failure: Exception = error
                response = getattr(error, "response", None)
                retry_after = response.headers.get("retry-after", "") if response is not None else ""
                if wait is not None and re.fullmatch(r"\d+(\.\d+)?", retry_after):
                    wait = min(float(retry_after), 60.0)
            except (openai.APIResponseValidationError, json.JSONDecodeError, MalformedResponse) as error:
                failure = error
            except openai.APIStatusError as error:
                raise JudgeFailure(f"{self.name} refuses: {error.status_code} {error.message}") from error
            if wait is None:
                raise JudgeFailure(f"{self.name}: no reply after {ATTEMPTS} attempts: {failure}") from failure
            with self._lock:
                self.usage.retries += 1
            time.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _request(self, kind: str, case: Case) -> str:
        response = self.client.chat.completions.create(
            model=str(self.model),
            messages=[{"role": "user", "content": case.prompt(kind)}],
            temperature=0,
            seed=0,
            max_tokens=64,
        )
        try:
            text = response.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise MalformedResponse(f"the response holds no message: {str(response)[:200]}") from error
        if not isinstance(text, str):
            raise MalformedResponse(f"the message holds no text: {str(response)[:200]}")
        with self._lock:
            self.usage.requests += 1
            if response.usage is not None:
                self.usage.prompt_tokens += response.usage.prompt_tokens
                self.usage.completion_tokens += response.usage.completion_tokens
        return text


class MalformedResponse(ValueError):
    """A response with status 200 that holds no reply."""


class LocalJudge(Judge):
    """A causal language model from a local folder, with greedy decoding."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        weights = storage.file_hash(folder / "config.json", *sorted(folder.glob("*.safetensors")))[:16]
        super().__init__(f"local {folder.name} {weights}")  # with the hash, because two folders may share a name
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval().to(device)
        )  # type: ignore[arg-type]

    def reply(self, kind: str, case: Case) -> str:
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


class StringJudge(Judge):
    """Rules that need no language model: head nouns, and sentence embeddings where they differ.

    `object`: T if the answer's head noun is the label's, or either text's noun occurs in the other, or the cosine of
    the two nouns is at least 0.8. `class`: the class whose name occurs in the answer (the longest), else the nearest by
    cosine. `caption`: 100 times the cosine of both texts, negative cosines as 0.
    """

    def __init__(self, sentence_encoder: Path):
        super().__init__(f"string 1 {sentence_encoder.name}")
        self.folder = sentence_encoder
        self.embeddings: dict[str, Tensor] = {}

    def prepare(self, kind: str, cases: Sequence[Case]) -> None:
        """Embed all texts at once."""
        texts = {case.answer for case in cases} | {name for case in cases for name in case.classes}
        texts |= {case.truth for case in cases}
        texts |= {head_noun(text) or text for case in cases for text in (case.answer, case.label or case.truth)}
        if missing := sorted(texts - self.embeddings.keys()):
            self.embeddings |= dict(zip(missing, metrics.embed(self.folder, missing), strict=True))

    def cosine(self, a: str, b: str) -> float:
        return float(self.embeddings[a] @ self.embeddings[b])

    def reply(self, kind: str, case: Case) -> str:
        words = f" {' '.join(re.findall('[a-z0-9]+', case.answer.lower()))} "
        if kind == "caption":
            return f"{round(100 * max(0.0, self.cosine(case.answer, case.truth)))}#cosine of the two texts"
        if kind == "class":
            named = [name for name in case.classes if f" {name} " in words]
            best = max(named, key=len) if named else max(case.classes, key=lambda name: self.cosine(name, case.answer))
            return f"{case.classes.index(best)}#{best}#{'named' if named else 'nearest by cosine'}"
        ours, theirs = (head_noun(text) or text for text in (case.answer, case.label or case.truth))
        reference = f" {' '.join(re.findall('[a-z0-9]+', case.truth.lower()))} "
        if ours and (ours == theirs or f" {ours.lower()} " in reference or f" {theirs.lower()} " in words):
            return "T#the noun is the same"
        near = self.cosine(ours, theirs)
        return f"{'T' if near >= 0.8 else 'F'}#cosine of the nouns {near:.2f}"


def build_judge(options: JudgeOptions) -> Judge:
    """The judge that the options name."""
    if options.base_url is not None:
        return EndpointJudge(options)
    if options.model == "string":
        return StringJudge(assets.sentence_encoder())
    folder = Path(str(options.model))
    if not (folder / "config.json").exists():
        raise ValueError(
            f"--judge.model {options.model}: expected `string`, or the folder of a language model; the name of a "
            "served model also needs --judge.base_url, its endpoint"
        )
    return LocalJudge(folder)
