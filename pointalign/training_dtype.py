"""The dtype that a run trains in where `model.dtype` is `auto`: measured on a CPU, and kept when the run is resumed.

A CPU with instructions for bfloat16 may still be faster in float32. Steps through one decoder layer of the language
model, with its adapters, tell in less than a second or two; weights and data are not needed.
"""

from copy import deepcopy
from pathlib import Path
from time import process_time  # unlike the wall clock it does not count what other programs take
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pointalign import language_model, run_checkpoints
from pointalign.model_options import ModelOptions
from pointalign.options import Options
from pointalign.precision import dtype_name, resolve_dtype

DTYPES = (torch.float32, torch.bfloat16)
MARGIN = 1.1  # bfloat16 must be so many times as fast: float32 rounds less, and a near tie falls the same way each time
SHORTEST = 5e-3  # seconds of a step in float32 below which noise would decide, and nothing is gained
ROWS, LENGTH = 16, 64  # of a measured batch, where that of the training is not smaller
TIMED = 3  # steps that count, after one that warms up; the fastest is the time of the dtype


def training_dtype(options: Options) -> str:
    """The name of the dtype of the language model's weights in this run, the same in every process.

    `model.dtype`, if it names one. `auto` is the dtype of the checkpoint from which the run goes on; else the faster
    one by measurement on a CPU, and by `resolve_dtype` on a GPU. The choice and its reason are printed.

    Raises:
        CheckpointError: the checkpoint is damaged.
        FileNotFoundError: there is no such checkpoint or language model.
    """
    if options.model.dtype != "auto":
        return options.model.dtype
    training = options.training
    chosen: list[Any] = [None]
    if training.process_index == 0:
        chosen[0], reason = _choose(options)
        print(f"model.dtype=auto: {chosen[0]}, {reason}")
    if training.world_size > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(chosen)
    return chosen[0]


def _choose(options: Options) -> tuple[str, str]:
    """The name of a dtype, and why."""
    training, checkpoint = options.training, None
    if training.resume_from_checkpoint:
        checkpoint, _ = run_checkpoints.find(training.resume_from_checkpoint, Path(training.output_dir or "runs"))
    if checkpoint is not None:
        recorded = run_checkpoints.verify(checkpoint)["run"].get("model", {}).get("dtype", "auto")
        if recorded != "auto":
            return recorded, f"in which {checkpoint} was written"
        return dtype_name(resolve_dtype("auto")), f"as {checkpoint} was written before runs recorded their dtype"
    if training.device.type != "cpu":
        rule = dtype_name(resolve_dtype("auto"))
        return rule, f"as this GPU {'computes' if rule == 'bfloat16' else 'does not compute'} in bfloat16"
    if not has_bfloat16_products():
        return "float32", "as PyTorch has no fast bfloat16 products on this CPU"
    config = AutoConfig.from_pretrained(language_model.find_folder(options.model.llm), trust_remote_code=False)
    sizes = [part.batch_size for part in options.data.mixture] or [options.training.per_device_train_batch_size]
    seconds = step_seconds(config.get_text_config(), options.model, min(ROWS, max(sizes)))
    times = " and ".join(f"{1e3 * value:.3g} CPU ms in {name}" for name, value in seconds.items())
    return faster(seconds), f"measured: a step through one layer takes {times}"


def has_bfloat16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; without it PyTorch does so number by number."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def faster(seconds: dict[str, float]) -> str:
    """`bfloat16` if it is faster by `MARGIN` and a step takes long enough to tell, else `float32`."""
    clear = seconds["float32"] > max(SHORTEST, MARGIN * seconds["bfloat16"])
    return "bfloat16" if clear else "float32"


def step_seconds(config: PreTrainedConfig, options: ModelOptions, rows: int) -> dict[str, float]:
    """CPU seconds of forward and backward pass through one decoder layer with adapters, by name of dtype.

    The layer has random weights and is not quantised; the dtypes take turns. The global generators are left as they
    were.

    Args:
        config: of the language model.
        options: the adapters.
        rows: of a batch `[rows, LENGTH]`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {dtype: _one_layer(config, options, dtype) for dtype in DTYPES}
        batch = torch.randn(rows, LENGTH, config.hidden_size)
        times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
        for _ in range(1 + TIMED):
            for dtype, layer in layers.items():
                began = process_time()
                _step(layer, batch, dtype)
                times[dtype].append(process_time() - began)
    return {dtype_name(dtype): min(values[1:]) for dtype, values in times.items()}


def _one_layer(config: PreTrainedConfig, options: ModelOptions, dtype: torch.dtype) -> Any:
    """A language model of one decoder layer and a few words, its linear layers adapted as the options say."""
    from peft import LoraConfig, inject_adapter_in_model

    config = deepcopy(config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).requires_grad_(False)
    if options.lora_rank:
        adapter = LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha, target_modules=options.lora_targets)
        inject_adapter_in_model(adapter, model)
    return model.train().get_decoder()


def _step(layer: Any, batch: Tensor, dtype: torch.dtype) -> None:
    """As a training step: 16-bit weights under autocast, the gradient down to the embeddings."""
    embeddings = batch.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = layer(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    hidden.float().square().mean().backward()
