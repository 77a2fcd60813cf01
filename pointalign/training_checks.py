"""Arguments of `transformers.TrainingArguments` that this project's training would ignore or fail on, refused by name.

The Trainer accepts them all, and some it never reads: the loss is computed by the model, held-out losses by a callback.
"""

from dataclasses import fields

from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

_HELD_OUT = "--data.validation FILE gives both losses on held-out conversations at every log"
_BEST = "--training.early_stopping_patience N ends a run, with its best weights, by the losses of --data.validation"
_EVALUATIONS = (
    "eval_strategy", "do_eval", "do_predict", "eval_on_start", "eval_steps", "eval_delay", "eval_accumulation_steps",
    "per_device_eval_batch_size", "batch_eval_metrics", "prediction_loss_only", "include_for_metrics",
)  # fmt: skip
_PRECISION = "the precision follows model.dtype"

# name -> why, or what to do; a value other than the default of transformers is refused
REFUSED = {
    "label_smoothing_factor": "the model computes the loss itself, without smoothing",
    "neftune_noise_alpha": "no noise is added to embeddings that point tokens replace; try data.augmentation",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "torch_compile": "the loss reads a hidden layer through a hook, which torch.compile does not keep; use --fused",
    "torch_compile_backend": "the loss reads a hidden layer through a hook, which torch.compile does not keep",
    "torch_compile_mode": "the loss reads a hidden layer through a hook, which torch.compile does not keep",
    "use_liger_kernel": "use --fused, which patches the language model behind the point branch",
    "optim_target_modules": "optimizers that need it project the gradients of full weights; LoRA trains here",
    "auto_find_batch_size": "use training.auto_batch, which does not change the training",
    "push_to_hub": "the Trainer holds model and alignment projector together; push the folder `model` of the run",
    "deepspeed": "training.fsdp shards the model",
    "save_only_model": "a checkpoint without optimizer state could not be resumed; the run writes stage.safetensors",
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    **dict.fromkeys(_EVALUATIONS, _HELD_OUT),
}
_PROJECTED = ("galore", "apollo", "lomo", "adalomo")  # optimizers of full weights, by the first words of their names


def check_arguments(training: TrainingArguments) -> None:
    """Raises: ValueError: an argument would be ignored or fail; names it, and what to do instead."""
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for name, advice in REFUSED.items():
        if name in defaults and getattr(training, name) not in (defaults[name], None, False, []):
            raise ValueError(f"training.{name}={getattr(training, name)!s} has no effect here: {advice}")
    if training.save_strategy == "best":
        raise ValueError(f"training.save_strategy=best: expected steps, epoch or no; {_BEST}")
    if training.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "training.train_sampling_strategy=group_by_length: samples have no length yet; use data.packing"
        )
    if training.remove_unused_columns:
        raise ValueError("training.remove_unused_columns would remove the clouds: leave it false")
    _check_reports(training)
    _check_optimizer(training)


def _check_reports(training: TrainingArguments) -> None:
    reports = [training.report_to] if isinstance(training.report_to, str) else training.report_to or []
    missing = sorted(set(reports) - {"none", "all", *get_available_reporting_integrations()})
    if missing:
        raise ValueError(f"training.report_to: {missing[0]} is not installed or not known: install it, or use none")


def _check_optimizer(training: TrainingArguments) -> None:
    name = str(getattr(training.optim, "value", training.optim))
    if name.startswith(_PROJECTED):
        raise ValueError(f"training.optim={name}: {REFUSED['optim_target_modules']}; expected for example adamw_torch")
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError) as error:
        raise ValueError(f"training.optim={name}: {error}") from error


def check_precision(training: TrainingArguments, dtype: str) -> None:
    """Refuse precisions that contradict one another.

    Args:
        dtype: `model.dtype`.

    Raises: ValueError: names both options.
    """
    if training.fp16 and training.device.type != "cuda":
        raise ValueError("training.fp16 scales gradients on a GPU; this run is on a CPU: leave it out")
    if training.fp16 and dtype not in ("float16", "float32"):
        raise ValueError(f"training.fp16 needs model.dtype=float16 or float32, got {dtype}: {_PRECISION}")
    if training.bf16 and dtype == "float16":
        raise ValueError(f"training.bf16 with model.dtype=float16: {_PRECISION}, choose bfloat16")
    if dtype == "float16" and not training.fp16:
        raise ValueError("model.dtype=float16 needs training.fp16=true: without its scaler small gradients are lost")


def check_cuda_graphs(training: TrainingArguments, dtype: str, attention: str, pack_tokens: int) -> None:
    """Refuse `training.cuda_graphs` where a graph cannot be captured, or batches would differ in shape.

    Args:
        dtype, attention, pack_tokens: `model.dtype`, `model.attention`, `data.pack_tokens`.

    Raises: ValueError: says what to change.
    """
    checkpointing = any(
        getattr(training, name, False) for name in ("activation_checkpointing", "gradient_checkpointing")
    )
    problems = {
        "packed batches of one size: set data.packing=true and data.pack_tokens": not pack_tokens,
        "a CUDA device; this run is on a CPU: leave it out": training.device.type != "cuda",
        "a run of one process that is not sharded": training.world_size > 1 or bool(training.fsdp),
        "training.activation_checkpointing=false: a layer that is computed again cannot be captured": checkpointing,
        f"model.attention=auto or varlen, got {attention}": attention not in ("auto", "varlen"),
        "16 bits, which FlashAttention reads: choose model.dtype=bfloat16": dtype == "float32"
        and not (training.bf16 or training.fp16),
    }
    for need, violated in problems.items():
        if violated:
            raise ValueError(f"training.cuda_graphs needs {need}")
