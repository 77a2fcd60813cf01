"""How a judge's reply is read."""

import re

from pointalign.evaluation.judge_prompts import Case

_REASONING = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_REASONING_END = re.compile(r"</(think|thinking|thought|reasoning)>", re.IGNORECASE)
_REASONING_START = re.compile(r"<(think|thinking|thought|reasoning)>", re.IGNORECASE)
_FINAL_CHANNEL = "<|channel|>final<|message|>"  # of gpt-oss, where a server passes its channels on


def without_reasoning(reply: str) -> str:
    """The reply behind the thoughts of a reasoning model; "" where it was cut inside them."""
    reply = reply.rpartition(_FINAL_CHANNEL)[2]
    reply = _REASONING.sub("", reply)
    ends = list(_REASONING_END.finditer(reply))  # the opening may be part of the prompt
    reply = reply[ends[-1].end() :] if ends else reply
    start = _REASONING_START.search(reply)
    return (reply[: start.start()] if start else reply).strip()


_LABEL = r"(?:(?:final |short )?(?:score|answer|result|rating|verdict|reply|output|index|class)\s*[:=]\s*)?"
_END = r"\s*(?:$|[#:,.;)(\]–—-])"
_SHAPES = {
    "object": re.compile(rf"{_LABEL}(t|f|true|false|yes|no){_END}", re.IGNORECASE),
    "class": re.compile(rf"{_LABEL}[(\[]?(-?\d{{1,4}})(?!\.\d){_END}", re.IGNORECASE),
    "caption": re.compile(
        rf"{_LABEL}[(\[]?(\d{{1,3}}(?:\.\d+)?)\s*(?:%|(?:/|out of)\s*(100|10)\b)?{_END}", re.IGNORECASE
    ),
}


def verdict(kind: str, reply: str, case: Case) -> float | None:
    """A reply as a number in 0..1, None if it is unusable.

    `object`: `T#...` or `F#...`; `class`: `index#...`, 1 if the index is the label's; `caption`: `score#...`. Thoughts,
    emphasis, code fences and a label such as `Score:` before the verdict are passed over; a verdict counts that opens
    the first line of the reply or the last.
    """
    lines = [line.strip() for line in without_reasoning(reply).splitlines()]
    lines = [line.strip("*_`'\"> ") for line in lines if line and not line.startswith("```")]
    for line in dict.fromkeys([*lines[:1], *lines[-1:]]):
        match = _SHAPES[kind].match(line.replace("**", "").replace("`", ""))
        if match:
            return _value(kind, match, case)
    return None


def _value(kind: str, match: re.Match[str], case: Case) -> float | None:
    if kind == "object":
        return float(match[1].lower() in ("t", "true", "yes"))
    if kind == "class":
        number = int(match[1])
        return float(number == case.classes.index(case.label)) if -1 <= number < len(case.classes) else None
    score = float(match[1]) / (10 if match[2] == "10" else 100)
    return score if score <= 1 else None
