"""Training in less memory and time: attention for packed batches, lean parts, no point branch, a fitting batch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pointalign import feature_cache, fused, memory
from pointalign.models.attention import choose_attention
from pointalign.options import Options


@contextmanager
def training_form(model: Any, options: Options) -> Iterator[dict[str, int]]:
    """Within the block `model` (a `PointAlignForConditionalGeneration`) has the form that the options ask for.

    Outside it is an ordinary model again, which reads padded batches, answers, and can be saved.

    Yields:
        modules taken over by each fused part, see `fused.applied`.
    """
    language_model = model.model.language_model
    before = language_model.config._attn_implementation
    device_type = options.training.device.type
    attention = choose_attention(options.model.attention, options.data.packing, device_type)
    with ExitStack() as stack:
        if options.data.feature_cache is not None:
            stack.enter_context(feature_cache.without_point_branch(model))
        stack.callback(language_model.set_attn_implementation, before)
        language_model.set_attn_implementation(attention)
        parts = options.fused_parts if options.fused_parts is not None else fused.PARTS
        yield stack.enter_context(fused.applied(model, parts if options.fused else ()))


def open_cache(model: Any, extractor: Any, options: Options) -> feature_cache.FeatureCache | None:
    """The feature cache of `--data.feature_cache`, checked against the model and the preprocessing at hand.

    Raises:
        ValueError: it is stale or not complete, or a part of the point branch trains that it stands for.
    """
    if options.data.feature_cache is None:
        return None
    trained = sorted({*feature_cache.TRAINABLE} & {*options.model.train})
    if trained:
        raise ValueError(
            f"data.feature_cache holds features of a frozen point branch, but model.train has {trained[0]}"
        )
    if options.training.contrastive_steps:
        raise ValueError("training.contrastive_steps trains the point branch that data.feature_cache stands for")
    encoder = options.alignment.target == "encoder"
    return feature_cache.FeatureCache(options.data.feature_cache, feature_cache.fingerprint(model, extractor), encoder)


def plan_memory(aligned: Any, dataset: Any, collator: Any, options: Options) -> memory.Budget:
    """The memory of a training step, measured on two samples; `--training.auto_batch` fits the batch to it.

    Args:
        aligned: `AlignedModel`, in training form.

    Raises:
        ValueError: not even one sample fits, or the options contradict one another.
    """
    training, device = options.training, options.training.device
    if training.auto_batch and options.data.mixture:
        raise ValueError("training.auto_batch cannot split a batch of data.mixture: lower its batch_size")
    if training.auto_batch and options.data.pack_tokens:
        raise ValueError("training.auto_batch counts samples, data.pack_tokens tokens: choose one")
    aligned.to(device)
    if training.gradient_checkpointing:
        aligned.gradient_checkpointing_enable(gradient_checkpointing_kwargs=training.gradient_checkpointing_kwargs)
    size = training.per_device_train_batch_size
    probe = min(2, size, len(dataset))
    with torch.random.fork_rng():
        batch = collator([dataset[index] for index in range(probe)])
        batch = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in batch.items()}
        supervised = int((batch["labels"] != -100).sum())
        aligned.train()
        found = memory.budget(aligned, lambda: aligned(**batch)["loss"], supervised, device, training.memory_limit_gb)
    share = options.data.pack_tokens / batch["input_ids"].numel() if options.data.pack_tokens else size / probe
    whole = found.of(share)
    if training.auto_batch:
        fitting = memory.fitting_batch(whole, size)
        training.gradient_accumulation_steps *= size // fitting
        training.per_device_train_batch_size = fitting
        whole = whole.of(fitting / size)
    return whole
