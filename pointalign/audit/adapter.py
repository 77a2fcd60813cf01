"""The three functions that an audit needs of a model: built in, or in a Python file of the user's.

A file `--adapter FILE.py` defines

    load(model)                          whatever the other functions need; `model` as it stands on the command line
    prompt(loaded, question, cloud)      a prompt; `cloud` is `[N, 6]` float32 (xyz with y up, colours in 0..1) or None:
                                         the question alone, without point tokens
    answer(loaded, prompts, candidates)  a reply to each prompt

and may define `states(loaded, clouds)`, for retention by layer: `{place: [C, F]}`, the mean state of the point tokens
of C clouds at each place, from the input of the language model to its last layer.

A cloud of zeros carries neither shape nor colour; a model that cannot encode it puts zeros in the place of its point
tokens. `candidates` are lists of texts, empty where none is to be scored. A reply is a dict:

    text            the generated answer, greedy where the model can
    probability     of that text, the product over its tokens; None where it is not known
    scores          the log-likelihood of each candidate as the answer; None without candidates, or where not known
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

BUILT_IN = {"pointalign": "pointalign.audit.own_adapter", "pointllm": "pointalign.audit.pointllm_adapter"}
FUNCTIONS = ("load", "prompt", "answer")


@dataclass(frozen=True)
class Adapter:
    """The functions of an adapter; `states` is None where it has none."""

    name: str
    load: Callable[[str], Any]
    prompt: Callable[[Any, str, np.ndarray | None], Any]
    answer: Callable[[Any, Sequence[Any], Sequence[list[str]]], list[dict[str, Any]]]
    states: Callable[[Any, Sequence[np.ndarray]], dict[str, np.ndarray]] | None = None

    def reply(
        self,
        loaded: Any,
        questions: Sequence[str],
        clouds: Sequence[np.ndarray | None],
        candidates: Sequence[list[str]],
    ) -> list[dict[str, Any]]:
        """Replies to questions, checked.

        Raises: ValueError: the adapter's replies are not as the top of this file says.
        """
        prompts = [self.prompt(loaded, question, cloud) for question, cloud in zip(questions, clouds, strict=True)]
        replies = self.answer(loaded, prompts, candidates)
        if len(replies) != len(prompts):
            raise ValueError(f"adapter {self.name}: answer() gave {len(replies)} replies to {len(prompts)} prompts")
        return [self._checked(reply, texts) for reply, texts in zip(replies, candidates, strict=True)]

    def _checked(self, reply: dict[str, Any], candidates: list[str]) -> dict[str, Any]:
        text, probability, scores = (reply.get(name) for name in ("text", "probability", "scores"))
        problem = ""
        if not isinstance(text, str):
            problem = f"`text` is {text!r}, expected a string"
        elif probability is not None and not 0 <= probability <= 1.0001:
            problem = f"`probability` is {probability!r}, expected None or a number between 0 and 1"
        elif scores is not None and (len(scores) != len(candidates) or not all(map(math.isfinite, scores))):
            problem = f"`scores` is {scores!r}, expected None or {len(candidates)} finite log-likelihoods"
        if problem:
            raise ValueError(f"adapter {self.name}: in a reply of answer() {problem}")
        return {
            "text": text,
            "probability": None if probability is None else min(float(probability), 1.0),
            "scores": [float(score) for score in scores] if scores and candidates else None,
        }


def find(name: str) -> Adapter:
    """A built-in adapter by name, or that of a Python file, which is run.

    Raises:
        FileNotFoundError: neither.
        ValueError: the file lacks a function.
    """
    if name in BUILT_IN:
        return of_module(importlib.import_module(BUILT_IN[name]), name)
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(f"--adapter {name}: expected {', '.join(BUILT_IN)}, or a Python file that is there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return of_module(module, path.name)


def of_module(module: ModuleType, name: str) -> Adapter:
    """Raises: ValueError: the module lacks a function."""
    if missing := [function for function in FUNCTIONS if not callable(getattr(module, function, None))]:
        raise ValueError(f"adapter {name}: expected the functions {', '.join(FUNCTIONS)}; {missing[0]} is missing")
    return Adapter(name, module.load, module.prompt, module.answer, getattr(module, "states", None))
