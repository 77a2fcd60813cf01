"""For programs that serve the language model: prompts as embeddings, and answers with a compiled decoding step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig

CACHE_LENGTH = 1024  # tokens of prompt and answer that a static cache has room for


@torch.no_grad()
def prompt_embeddings(model: Any, inputs: Any, processor: Any = None) -> list[Tensor]:
    """See `PointAlignForConditionalGeneration.prompt_embeddings`."""
    if not isinstance(inputs, Mapping):
        if processor is None:
            raise ValueError(
                "prompt_embeddings of messages needs the processor: prompt_embeddings(messages, processor)"
            )
        inputs = processor.apply_chat_template(inputs, tokenize=True, add_generation_prompt=True)
    batch = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    ids, attention = batch.pop("input_ids"), batch.pop("attention_mask", None)
    embeddings, _ = model.model.embed(ids, **batch)
    if attention is None:
        return list(embeddings)
    return [row[places.bool()] for row, places in zip(embeddings, attention, strict=True)]


def compiled_generation(backend: str = "inductor", cache_length: int = CACHE_LENGTH) -> dict[str, Any]:
    """Options of `generate` with a static cache and a decoding step by torch.compile, on a CPU too.

    The step is compiled for a number of rows and a length of the cache, at the first answer.

    Args:
        backend: of torch.compile.
        cache_length: room for prompt and answer; a longer one is given a larger cache, and compiled again.
    """
    config = CompileConfig(backend=backend, mode="reduce-overhead" if torch.cuda.is_available() else "default")
    config._compile_all_devices = True  # type: ignore[assignment]  # transformers leaves out CPUs otherwise
    options: dict[str, Any] = {"cache_implementation": "static", "compile_config": config}
    if hasattr(GenerationConfig(), "max_cache_len"):  # of transformers 5.20 or newer
        options["max_cache_len"] = cache_length
    return options
