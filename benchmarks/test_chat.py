"""First token of an answer about a cloud with the shipped model: from the start of the process, and once it is loaded.

    pytest benchmarks/test_chat.py --benchmark-only --results FOLDER

Needs the embedded language model, which `pointalign assets` prepares.
"""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from point_op_contenders import ops_replaced, surfaces
from turns import quantiles

from pointalign import assets
from pointalign.build import load
from pointalign.efficient.memory import peak_resident_bytes
from pointalign.models.serving import compiled_generation
from pointalign.storage import ROOT
from pointalign_kernels import farthest_point_sample, group_points, point_ops

QUESTION = "What is this?"
ANSWER_TOKENS = 24  # as long as a short description
LANGUAGE_MODEL = assets.home() / "llm/smollm2-135m-instruct"

pytestmark = pytest.mark.skipif(
    not (LANGUAGE_MODEL / assets.STAMP).exists(),
    reason="the embedded language model is not there: run `pointalign assets`",
)


def coloured_cloud() -> np.ndarray:
    """`[8192, 6]` float32."""
    points = surfaces(1, 8192)[0]
    return torch.cat([points, torch.rand(points.shape)], dim=-1).numpy()


def talk(file: Path) -> dict[str, Any]:
    """Seconds from the start of `pointalign.chat` to its prompt, to the first token and from question to token."""
    command = [sys.executable, "-m", "pointalign.chat", str(file), "--max-new-tokens", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        printed = []
        while not (line := process.stdout.readline()).startswith("Ask away"):
            printed.append(line)
            assert line, f"{' '.join(command)} ended before its prompt; it printed {printed}"
        ready = time.perf_counter()
        answered = []
        for _ in range(2):
            asked = time.perf_counter()
            process.stdin.write(QUESTION + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer.startswith("> "), f"expected the prompt and an answer, got {answer!r}"
            answered.append((asked, time.perf_counter()))
        peak = peak_resident_bytes(process.pid)
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    return {
        "start to prompt": ready - start,
        "start to first token": answered[0][1] - start,
        "first question to its first token": answered[0][1] - answered[0][0],
        "second question to its first token": answered[1][1] - answered[1][0],
        "peak_bytes": peak,
    }


def test_first_token_from_the_start(benchmark, small, record_race, tmp_path):
    file = tmp_path / "cloud.npy"
    np.save(file, coloured_cloud())
    talks: list[dict[str, Any]] = []
    benchmark.pedantic(lambda: talks.append(talk(file)), rounds=1 if small else 5, warmup_rounds=0 if small else 1)
    if benchmark.stats is None:
        return
    talks = talks[-len(benchmark.stats.stats.data) :]  # the warm-up fills the file cache
    peaks = [talk.pop("peak_bytes") for talk in talks]
    row = {
        "race": "chat from the start of the process",
        "threads": torch.get_num_threads(),
        "model": assets.SHIPPED_CHECKPOINT,
    }
    row["steps"] = {name: quantiles([talk[name] for talk in talks]) for name in talks[0]}
    row["rounds"], row["peak_bytes"] = len(talks), max(peaks) if all(peaks) else None
    record_race("chat", row)


def test_first_token_of_a_loaded_model(device, race, record_race):
    model, processor, _ = load(assets.SHIPPED_CHECKPOINT)
    content = [{"type": "point", "point": coloured_cloud()}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]

    def first_token() -> torch.Tensor:
        batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True).to(model.device)
        with torch.inference_mode():
            return model.generate(**batch, max_new_tokens=1, do_sample=False)

    sample, group = (partial(op, impl="reference") for op in (farthest_point_sample, group_points))

    def with_reference_ops() -> torch.Tensor:
        with ops_replaced(sample, group):
            return first_token()

    calls = {"reference point ops": with_reference_ops}
    if device.type in point_ops.NATIVE_DEVICES:
        calls = {"native point ops": first_token} | calls
    truth = with_reference_ops()
    for name, call in calls.items():
        assert torch.equal(call(), truth), f"{name}: another first token than with the reference"
    timing = race(calls)
    if timing is not None:
        row = {"race": "chat, loaded", "threads": torch.get_num_threads(), "model": assets.SHIPPED_CHECKPOINT}
        record_race("chat", row | timing)


def test_an_answer_with_a_static_cache(device, race, record_race):
    """A grown cache against one of a fixed size, whose decoding step is compiled and captured on a GPU."""
    if device.type != "cuda":
        pytest.skip("on a CPU a static cache takes as long as one that grows: it is for captured steps on a GPU")
    model, processor, _ = load(assets.SHIPPED_CHECKPOINT)
    content = [{"type": "point", "point": coloured_cloud()}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True).to(model.device)

    def answer(**options: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                **batch, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS, do_sample=False, **options
            )

    ways = {
        "cache that grows": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "static cache, compiled step": compiled_generation(),
    }
    calls = {name: partial(answer, **options) for name, options in ways.items()}
    for call in calls.values():
        call()  # the compiled step is compiled
    timing = race(calls)
    if timing is not None:
        row = {"race": "chat, answer", "tokens": ANSWER_TOKENS, "model": assets.SHIPPED_CHECKPOINT}
        record_race("chat", row | timing)
