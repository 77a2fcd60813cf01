"""What a judge is asked: this project's prompts, or those of a file, such as the published ones."""

import ast
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

PROMPT_VERSION = "2"
PROMPTS = {
    "object": (
        "Two texts each describe one 3D object.\nReference: {ground_truth}\nAnswer: {model_output}\n"
        "Do both name the same kind of object? Ignore colour, material, style and any further detail. A more general "
        "or a more special name counts if it can mean the same thing.\n"
        "Reply in one line: T#short reason, if they do; F#short reason, if not."
    ),
    "class": (
        "Classes, by index:\n{candidate_lists}\nAnswer: {model_output}\n"
        "Which class does the answer describe best? If it fits none of them, reply -1#NA#short reason.\n"
        "Reply in one line: index#class#short reason."
    ),
    "caption": (
        "A reference caption of a 3D object and a caption to be rated.\nReference: {ground_truth}\n"
        "Caption: {model_output}\n"
        "Which share of what the reference says (kind of object, parts, colours, shape, use) does the caption state "
        "correctly? Near synonyms count, contradictions do not.\n"
        "Reply in one line: a whole number from 0 (nothing) to 100 (everything)#short reason."
    ),
}
PUBLISHED = {  # SHA-256 of a published prompt -> whose it is
    "22f530ba110cdd36c667aab093cd39e6fa9119afdf144b54e0882a1e3d410633": "PointLLM's",
    "500e73f47523d236d74bb2be925b5a522c27e89e5cac5457952029a37c952373": "PointLLM's",
    "7b0dd56cf34e8368255d2da0ccca617cd2f1cd04204939be1a03c04028ad889b": "PointLLM's",
    "674d063e1629f018bd95a1a7ab50a1f474e6ab5940fe1e1d7ba54544f7a6eb22": "MiniGPT-3D's for Qwen2",
    "d35f161f289960e65e33e371054e9a9c1378100b484ffb0dce357d5b97fa0840": "MiniGPT-3D's for Qwen2",
}
VARIABLES = {  # endings of the names that hold the prompts in the source of a published evaluator
    "object": "open_free_from_cls_prompt",
    "class": "close_set_cls_prompt",
    "caption": "object_captioning_prompt",
}
ANSWER = "{model_output}"


@dataclass(frozen=True)
class Case:
    """An answer to judge against a reference text `truth`; `classes` is the closed list of a `class` case."""

    truth: str
    answer: str
    label: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgePrompts:
    """Prompts by kind of verdict, with the places {ground_truth}, {model_output} and {candidate_lists}."""

    templates: dict[str, str]
    source: str

    def text(self, kind: str, case: Case) -> str:
        """The prompt about a case. What a place receives is not searched for places."""
        listed = "\n".join(f"{index}: {name}" for index, name in enumerate(case.classes))
        values = {"ground_truth": case.truth, "model_output": case.answer, "candidate_lists": listed}
        values["num_categories"] = str(len(case.classes))
        template = self.templates[kind]
        if ANSWER not in template:  # PointLLM's code appends this to its class prompt
            template += f"{ANSWER}\nOutput: "
        return re.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], template)

    def sha256(self, kind: str) -> str:
        return hashlib.sha256(self.templates[kind].encode()).hexdigest()

    def owner(self, kind: str) -> str | None:
        """Whose published prompt it is; None for another."""
        return PUBLISHED.get(self.sha256(kind))

    def described(self, kind: str) -> str:
        name = self.owner(kind)
        return f"{name}, from {self.source}" if name else f"{self.source}, not a published one"


OURS = JudgePrompts(PROMPTS, f"this project's, version {PROMPT_VERSION}")


def read_prompts(path: Path) -> JudgePrompts:
    """Prompts of a JSON file `{"object": ..., "class": ..., "caption": ...}`, or of the Python source of a published
    evaluator (`pointllm/eval/evaluator.py`), which is read and not run. A file need not hold every kind.

    Raises:
        ValueError: the file holds no prompt, or a prompt without a place for what it is about.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".py":
        strings = {
            target.id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str)
        }
        templates = {
            kind: next(value for name, value in strings.items() if name.endswith(ending))
            for kind, ending in VARIABLES.items()
            if any(name.endswith(ending) for name in strings)
        }
    else:
        templates = json.loads(text)
    if not isinstance(templates, dict) or not templates or set(templates) - set(PROMPTS):
        raise ValueError(
            f"{path}: expected prompts of the kinds {', '.join(PROMPTS)}, as JSON or in the source of PointLLM's "
            f"evaluator.py, got {', '.join(map(str, templates)) or 'none'}"
        )
    for kind, template in templates.items():
        needed = "{candidate_lists}" if kind == "class" else "{ground_truth}"
        if not isinstance(template, str) or needed not in template:
            raise ValueError(f"{path}: the {kind} prompt has no place {needed}")
    return JudgePrompts(templates, path.name)
