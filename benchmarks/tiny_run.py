"""Training runs of a tiny model through the command line, for measurements of what does not depend on its size."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from conftest import CLOUDS, byte_tokenizer, first_stage, tiny_text_config  # noqa: E402  # type: ignore[import]
from test_train import TINY  # noqa: E402  # type: ignore[import]
from transformers import AutoModelForCausalLM  # noqa: E402

from pointalign import train  # noqa: E402
from pointalign.models import configuration  # noqa: E402


def prepare(folder: Path) -> list[str]:
    """Write a language model, a first stage and a recipe; returns the arguments of `run` for four steps of training."""
    torch.set_num_threads(1)
    configuration.PRESETS["mini"] = TINY  # type: ignore[assignment]
    llm, recipe = folder / "llm", folder / "recipe.yaml"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(llm)
    byte_tokenizer().save_pretrained(llm)
    start = first_stage(llm, folder / "start.safetensors")
    recipe.write_text(
        f"""
model: {{llm: {llm}, checkpoint: {start}, train: [modality_projector, lora], lora_rank: 4, lora_dropout: 0.1}}
data: {{annotations: {CLOUDS / "annotations.json"}, clouds: {CLOUDS}, num_points: 256}}
alignment: {{weight: 0.1}}
training: {{max_steps: 4, logging_steps: 1, save_steps: 2, report_to: none, use_cpu: true, disable_tqdm: true,
            per_device_train_batch_size: 2, learning_rate: 1.0e-3, lr_scheduler_type: constant}}
"""
    )
    return [str(recipe)]


def run(arguments: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start a training in a process of its own, forked so that nothing is imported again; returns its number.

    Args:
        log: the file that gets what it prints.
        before: called in that process before it trains.
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        before()
        status = train.main(arguments)
    finally:  # whatever happens, the process must not return into the caller's loop
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int) -> int:
    """Wait for a process of `run`; its exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of what training has changed by a checkpoint: weights, optimizer, random numbers."""
    return {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))}
