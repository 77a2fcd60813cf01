"""Judged answers: by an OpenAI-compatible endpoint, by a local language model, or by rules that need neither.

There are three kinds of verdict, as in PointLLM's protocol. `object`: do answer and reference name the same object (T
or F)? `class`: which class of a closed list does the answer name (an index)? `caption`: how much of the reference does
the answer state (0 to 100)? An unusable reply counts once, as wrong.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pointalign import assets, storage
from pointalign.evaluation.judge_prompts import OURS, PROMPTS, Case, JudgePrompts, read_prompts
from pointalign.evaluation.judge_replies import verdict
from pointalign.evaluation.local_judges import Judge, LocalJudge, StringJudge, Usage
from pointalign.evaluation.statistics import cluster_mean

ATTEMPTS, PAUSE = 6, 1.0  # requests per answer; seconds between the first two, doubled after each


@dataclass
class JudgeOptions:
    """Who judges (`--judge.*`); without `model`, nothing is judged.

    Attributes:
        base_url: an OpenAI-compatible endpoint; its key is read from the environment variable OPENAI_API_KEY.
        model: the model's name at the endpoint; without `base_url`, the folder of a local causal language model, or
            `string` for the rules of `StringJudge`.
        prompts: file of prompts in place of this project's: JSON, or the source of PointLLM's `evaluator.py`.
        concurrency: number of simultaneous requests.
        timeout: seconds until a request counts as failed.
        max_tokens: of a reply, the thoughts of a reasoning model included.
        extra_body: further fields of every request, as JSON, such as '{"reasoning_effort": "low"}'.
    """

    base_url: str | None = None
    model: str | None = None
    prompts: str | None = None
    concurrency: int = 4
    timeout: float = 60.0
    max_tokens: int = 2048
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.base_url and not self.model:
            raise ValueError("--judge.base_url needs --judge.model, the model's name at that endpoint")
        if self.prompts and self.model == "string":
            raise ValueError("--judge.prompts needs a language model as judge; --judge.model string asks nobody")


class UnreadableReplies(ValueError):
    """So many replies of a judge cannot be read that its scores would say nothing; all replies are stored."""


class JudgeFailure(OSError):
    """An endpoint gave no reply to some answers; the other replies are stored, and the same command continues."""


@dataclass
class Judged:
    """Replies and verdicts (`values`) of all cases; a verdict is None where the reply is unusable."""

    replies: list[str]
    values: list[float | None]
    usage: Usage


def judge_cases(judge: Judge, kind: str, cases: Sequence[Case], stored: Path) -> Judged:
    """Judge every case; each reply is appended to the file `stored` as it comes. A reply that can be read is not asked
    for again by a later call.

    Raises:
        JudgeFailure: some cases got no reply; the other replies are stored.
        UnreadableReplies: more than a fifth of five or more replies cannot be read.
    """
    if kind not in PROMPTS:
        raise ValueError(f"judge of kind {kind!r}: expected one of {', '.join(PROMPTS)}")
    known = _read_replies(stored)
    if judge.prompts is not None and kind not in judge.prompts.templates:
        raise ValueError(f"{judge.prompts.source} holds no prompt of kind {kind}")
    keys = [_key(judge, kind, case) for case in cases]
    pending = {
        key: case
        for key, case in zip(keys, cases, strict=True)
        if key not in known or verdict(kind, known[key], case) is None
    }
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
        with lock, stored.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "reply": reply}) + "\n")
            known[key] = reply
            progress.update()

    with ThreadPoolExecutor(judge.workers) as pool:
        list(pool.map(ask, pending.items()))
    progress.close()
    if failures:
        missing = sum(key not in known for key in keys)
        raise JudgeFailure(f"{missing} of {len(cases)} answers got no reply; the others are stored: {failures[0]}")
    replies = [known[key] for key in keys]
    values = [verdict(kind, reply, case) for reply, case in zip(replies, cases, strict=True)]
    _check_readable(judge, replies, values)
    return Judged(replies, values, judge.usage)


MOST_UNREADABLE = 0.2  # of the replies
FEWEST_REPLIES = 5  # from which on the share is judged


def _check_readable(judge: Judge, replies: Sequence[str], values: Sequence[float | None]) -> None:
    unreadable = [reply for reply, value in zip(replies, values, strict=True) if value is None]
    if len(replies) >= FEWEST_REPLIES and len(unreadable) > MOST_UNREADABLE * len(replies):
        raise UnreadableReplies(
            f"{len(unreadable)} of {len(replies)} replies of {judge.name} cannot be read, such as "
            f"{unreadable[0][:200]!r}: a reasoning model may need more --judge.max_tokens, or --judge.extra_body that "
            "turns its thoughts off; else take another judge. The same command asks for these again"
        )


def _key(judge: Judge, kind: str, case: Case) -> str:
    parts = [judge.name, kind, judge.question(kind, case), case.label]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read_replies(path: Path) -> dict[str, str]:
    """Key -> reply of an earlier run; an incomplete last line is removed from the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    *lines, torn = text.split("\n")
    if torn:
        with storage.replacing(path) as temporary:
            temporary.write_text(text.removesuffix(torn), encoding="utf-8")
    return {entry["key"]: entry["reply"] for entry in map(json.loads, lines)}


def summary(judged: Judged, families: Sequence[str]) -> dict[str, Any]:
    """Mean with interval (an unusable reply counts as 0), the number of unusable replies, and requests and tokens.

    `usable_score` is the mean of the usable replies alone.
    """
    score = cluster_mean([value or 0.0 for value in judged.values], families).as_dict()
    usable = [value for value in judged.values if value is not None]
    return {
        "score": score,
        "usable_score": sum(usable) / len(usable) if usable else None,
        "invalid": judged.values.count(None),
        "usage": asdict(judged.usage),
    }


class EndpointJudge(Judge):
    """An OpenAI-compatible endpoint, asked at temperature 0 with a fixed seed, where it accepts them.

    A parameter that the endpoint refuses (reasoning models take no temperature and no max_tokens) is left out from then
    on, with a warning.

    A request is repeated after rate limits, server errors, timeouts, broken connections and responses that do not
    follow the protocol, after a growing pause (or the pause that `Retry-After` asks for). Any other error, such as a
    wrong key, ends the run.
    """

    def __init__(self, options: JudgeOptions):
        import openai

        extra = f" {json.dumps(options.extra_body, sort_keys=True)}" if options.extra_body else ""
        super().__init__(f"{options.base_url} {options.model}{extra}", _prompts(options), options.concurrency)
        self.model = options.model
        self.extra_body = options.extra_body
        self.parameters: dict[str, Any] = {"temperature": 0, "seed": 0, "max_tokens": options.max_tokens}
        self._lock = threading.Lock()
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = openai.OpenAI(base_url=options.base_url, api_key=key, timeout=options.timeout, max_retries=0)

    def reply(self, kind: str, case: Case) -> str:
        import openai

        waits: list[float | None] = [*(PAUSE * 2**attempt for attempt in range(ATTEMPTS - 1)), None]
        while True:
            wait = waits.pop(0)
            parameters = dict(self.parameters)
            try:
                return self._request(kind, case, parameters)
            except (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError) as error:
                failure: Exception = error
                response = getattr(error, "response", None)
                retry_after = response.headers.get("retry-after", "") if response is not None else ""
                if wait is not None and re.fullmatch(r"\d+(\.\d+)?", retry_after):
                    wait = min(float(retry_after), 60.0)
            except (openai.APIResponseValidationError, json.JSONDecodeError, MalformedResponse) as error:
                failure = error
            except openai.APIStatusError as error:
                if error.status_code in (400, 422) and self._leave_out(error, parameters):
                    waits.insert(0, wait)
                    continue
                raise JudgeFailure(f"{self.name} refuses: {error.status_code} {error.message}") from error
            if wait is None:
                raise JudgeFailure(f"{self.name}: no reply after {ATTEMPTS} attempts: {failure}") from failure
            with self._lock:
                self.usage.retries += 1
            time.sleep(wait)

    def _leave_out(self, error: Any, sent: dict[str, Any]) -> bool:
        """Drop the parameter that an error names from further requests. Returns whether it was one of those sent."""
        named = str(getattr(error, "param", "") or "")
        text = str(error.message)
        refused = next((name for name in sent if name == named), None) or next(
            (name for name in sent if re.search(rf"\b{name}\b", text)), None
        )
        if refused is None:
            return False
        with self._lock:
            if refused in self.parameters:
                value = self.parameters.pop(refused)
                instead = "max_completion_tokens" if refused == "max_tokens" else None
                if instead:
                    self.parameters[instead] = value
                print(
                    f"{self.name} refuses {refused}: asked {f'with {instead}' if instead else 'without it'}",
                    file=sys.stderr,
                )
        return True

    def _request(self, kind: str, case: Case, parameters: dict[str, Any]) -> str:
        response = self.client.chat.completions.create(
            model=str(self.model),
            messages=[{"role": "user", "content": self.question(kind, case)}],
            extra_body=self.extra_body or None,
            **parameters,
        )
        try:
            choice = response.choices[0]
            text = choice.message.content
            if text is None and choice.finish_reason == "length":
                text = ""  # cut inside its thoughts, which the server keeps apart
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
    return LocalJudge(folder, options.max_tokens, _prompts(options))


def _prompts(options: JudgeOptions) -> JudgePrompts:
    return read_prompts(Path(options.prompts)) if options.prompts else OURS
