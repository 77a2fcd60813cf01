"""Judges that need no endpoint: a local language model, and rules."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pointalign import storage
from pointalign.evaluation import caption_metrics
from pointalign.evaluation.judge_prompts import OURS, Case, JudgePrompts
from pointalign.evaluation.judge_replies import without_reasoning
from pointalign.evaluation.naming import head_noun

SHORT_REPLY = 64  # tokens that a verdict in one line needs at most


@dataclass
class Usage:
    """Counts of requests and tokens; a retry is a repeated request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    retries: int = 0


class Judge:
    """Base of the judges.

    Attributes:
        name: identifies a judge among stored replies.
        prompts: what it is asked; None for rules.
        workers: number of simultaneous cases.
    """

    def __init__(self, name: str, prompts: JudgePrompts | None, workers: int = 1):
        self.name, self.prompts, self.workers = name, prompts, workers
        self.usage = Usage()

    def question(self, kind: str, case: Case) -> str:
        """All that a reply may depend on, as text: the prompt, where there is one."""
        if self.prompts is None:
            return json.dumps([case.truth, case.answer, case.classes])
        return self.prompts.text(kind, case)

    def prepare(self, kind: str, cases: Sequence[Case]) -> None:
        """Called once, with all cases that lack a reply."""

    def reply(self, kind: str, case: Case) -> str:
        raise NotImplementedError


class LocalJudge(Judge):
    """A causal language model from a local folder, with greedy decoding.

    Args:
        prompts: what it is asked.
        max_tokens: of a reply of a model that thinks first; another gets `SHORT_REPLY`.
    """

    def __init__(self, folder: Path, max_tokens: int, prompts: JudgePrompts = OURS):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        weights = storage.file_hash(folder / "config.json", *sorted(folder.glob("*.safetensors")))[:16]
        super().__init__(
            f"local {folder.name} {weights}", prompts
        )  # with the hash, because two folders may share a name
        self.max_tokens = max_tokens
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval().to(device)
        )  # type: ignore[arg-type]

    def reply(self, kind: str, case: Case) -> str:
        messages = [{"role": "user", "content": self.question(kind, case)}]
        batch = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        prompt = batch["input_ids"].shape[1]
        thinks = self.tokenizer.decode(batch["input_ids"][0, -8:]).rstrip().endswith("<think>")
        limit = self.max_tokens if thinks else min(SHORT_REPLY, self.max_tokens)
        new, text = self._generate(batch, limit)
        if len(new) >= limit < self.max_tokens and "<think" in text and not without_reasoning(text):
            new, text = self._generate(batch, self.max_tokens)
        self.usage.requests += 1
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += len(new)
        return f"<think>{text}" if thinks else text

    def _generate(self, batch: Any, limit: int) -> tuple[Tensor, str]:
        """The new tokens, and their text."""
        with torch.inference_mode():
            generated = self.model.generate(**batch, max_new_tokens=limit, do_sample=False)  # type: ignore[operator]
        new = generated[0, batch["input_ids"].shape[1] :]
        return new, self.tokenizer.decode(new, skip_special_tokens=True)


class StringJudge(Judge):
    """Rules that need no language model: head nouns, and sentence embeddings where they differ.

    `object`: T if the answer's head noun is the label's, or either text's noun occurs in the other, or the cosine of
    the two nouns is at least 0.8. `class`: the class whose name occurs in the answer (the longest), else the nearest by
    cosine. `caption`: 100 times the cosine of both texts, negative cosines as 0.
    """

    def __init__(self, sentence_encoder: Path):
        super().__init__(f"string 1 {sentence_encoder.name}", None)
        self.folder = sentence_encoder
        self.embeddings: dict[str, Tensor] = {}

    def prepare(self, kind: str, cases: Sequence[Case]) -> None:
        """Embed all texts at once."""
        texts = {case.answer for case in cases} | {name for case in cases for name in case.classes}
        texts |= {case.truth for case in cases}
        texts |= {head_noun(text) or text for case in cases for text in (case.answer, case.label or case.truth)}
        if missing := sorted(texts - self.embeddings.keys()):
            self.embeddings |= dict(zip(missing, caption_metrics.embed(self.folder, missing), strict=True))

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
