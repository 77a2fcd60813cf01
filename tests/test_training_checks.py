"""Training arguments that are ignored, fail, or contradict the precision are named before anything is loaded."""

import pytest
import torch

from pointalign import build
from pointalign.model_options import DataOptions, ModelOptions
from pointalign.options import Options, TrainingOptions, parse

NOWHERE = ["align", "--model.llm", "nowhere", "--data.annotations", "none.json", "--data.clouds", "none"]


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("label_smoothing_factor", "0.1", "without smoothing"),
        ("neftune_noise_alpha", "5", "data.augmentation"),
        ("eval_strategy", "steps", "--data.validation FILE gives both losses"),
        ("per_device_eval_batch_size", "4", "--data.validation"),
        ("metric_for_best_model", "loss", "--training.early_stopping_patience N"),
        ("torch_compile", "true", "use --fused"),
        ("use_liger_kernel", "true", "use --fused"),
        ("optim_target_modules", "all-linear", "LoRA trains here"),
        ("optim", "galore_adamw", "full weights"),
        ("optim", "stable_adamw", "training.optim=stable_adamw"),  # its package is not installed
        ("auto_find_batch_size", "true", "training.auto_batch"),
        ("push_to_hub", "true", "the folder `model`"),
        ("save_strategy", "best", "expected steps, epoch or no"),
        ("save_only_model", "true", "could not be resumed"),
        ("remove_unused_columns", "true", "would remove the clouds"),
        ("report_to", "wandb", "wandb is not installed"),
        ("train_sampling_strategy", "group_by_length", "data.packing"),
        ("fp16", "true", "scales gradients on a GPU"),
    ],
)
def test_arguments_without_effect_are_refused_by_name(name, value, advice, capsys, monkeypatch):
    monkeypatch.setattr("pointalign.training_checks.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(SystemExit):
        parse([*NOWHERE, "--training.use_cpu", "true", f"--training.{name}={value}"])
    message = capsys.readouterr().err
    assert f"training.{name}" in message and advice in message


def test_the_best_model_and_a_metric_for_the_schedule_are_refused_with_an_evaluation_too(capsys):
    evaluation = ["--training.eval_strategy", "steps", "--training.eval_steps", "100"]
    with pytest.raises(SystemExit):
        parse([*NOWHERE, "--training.use_cpu", "true", *evaluation, "--training.load_best_model_at_end", "true"])
    assert (
        "load_best_model_at_end=True has no effect here: --training.early_stopping_patience" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        parse(
            [*NOWHERE, "--training.use_cpu", "true", *evaluation, "--training.lr_scheduler_type=reduce_lr_on_plateau"]
        )
    assert "training.metric_for_best_model=loss has no effect here" in capsys.readouterr().err


def test_defaults_and_true_as_a_checkpoint_pass():
    options = parse([*NOWHERE, "--training.use_cpu", "true", "--training.resume_from_checkpoint", "true"])
    assert options.training.resume_from_checkpoint in (True, "true")


class OnGpu(TrainingOptions):
    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        ("auto", {"fp16": True}, "training.fp16 needs model.dtype=float16 or float32, got auto"),
        ("bfloat16", {"fp16": True}, "got bfloat16"),
        ("float16", {"bf16": True}, "training.bf16 with model.dtype=float16"),
        ("float16", {}, "model.dtype=float16 needs training.fp16=true"),
        ("float16", {"fp16": True}, None),
        ("float32", {"fp16": True}, None),
        ("bfloat16", {}, None),
    ],
)
def test_precisions_that_contradict_one_another_are_refused(dtype, precision, message):
    training = OnGpu(use_cpu=True)
    for name, value in precision.items():
        setattr(training, name, value)
    options = Options(ModelOptions(dtype=dtype), DataOptions(), training=training)
    if message is None:
        options.check()
        return
    with pytest.raises(ValueError, match=message):
        options.check()


def test_auto_is_no_emulated_bfloat16(monkeypatch, capsys):
    """A T4 emulates bfloat16: PyTorch then calls it supported, unless it is asked about the hardware."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert build.resolve_dtype("auto") == torch.float32
    assert "float32, because this GPU only emulates bfloat16" in capsys.readouterr().err
    assert build.resolve_dtype("float16") == torch.float16


def test_mixed_precision_of_the_trainer_is_not_switched_off(processor, clouds):
    """With fp32 weights the dtype of the linear layers is that of the autocast around the model."""
    from conftest import assistant, tiny_model, user

    from pointalign.alignment import AlignmentConfig
    from pointalign.trainer import AlignedModel

    aligned = AlignedModel(tiny_model(), AlignmentConfig(weight=0.1, layer=[2]))
    talk = [user("What?", clouds[0]), assistant("A bench.")]
    batch = dict(processor.apply_chat_template(talk, tokenize=True, return_labels=True))
    seen = []
    aligned.model.get_decoder().layers[0].mlp.up_proj.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    with torch.no_grad():
        aligned(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            aligned(**batch)
    assert seen == [torch.float32, torch.bfloat16]
