"""Who judges: an OpenAI-compatible endpoint, a local language model, or rules."""

import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointalign.evaluation.judge import Case, Judge, JudgeFailure, JudgeOptions, Usage


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

        from pointalign.evaluation.loading import file_hash

        weights = file_hash(folder / "config.json", *sorted(folder.glob("*.safetensors")))
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
        from pointalign.evaluation.naming import head_noun
        from pointalign.evaluation.sentences import embed

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
