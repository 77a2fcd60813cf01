"""The options of a training run: one dotted namespace over one YAML recipe, and every check across options."""

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from pointalign import training_command
from pointalign.alignment import AlignmentConfig
from pointalign.model_options import CACHED_PARTS, DataOptions, ModelOptions
from pointalign.training_checks import check_arguments, check_cuda_graphs, check_precision

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

RECIPES = training_command.RECIPES


@dataclass
class TrainingOptions(TrainingArguments):
    """`transformers.TrainingArguments` with this project's defaults.

    Attributes:
        output_dir: folder of the run; where it holds another run, a number is appended, which is printed. With
            `resume_from_checkpoint` the folder of the checkpoint is used, unless that run is finished.
        resume_from_checkpoint: a checkpoint, a run's folder for its newest complete checkpoint, or `latest` (`true`)
            for that of `output_dir`; `auto` for that if there is any, else a new run in `output_dir`. Without a RECIPE
            all options are those of that run.
        max_steps: length of the run in optimizer steps; -1 for `num_train_epochs`.
        num_train_epochs: passes over the data, where `max_steps` is not set.
        per_device_train_batch_size: samples a step, on each device and for each of `gradient_accumulation_steps`.
        gradient_accumulation_steps: batches that are summed up before a step.
        learning_rate: highest rate, of adapters and projectors.
        lr_scheduler_type: course of the rate after the warm-up, such as cosine, linear or constant.
        warmup_steps: steps over which the rate rises; below 1, a share of the run.
        weight_decay: of matrices; vectors do not decay.
        max_grad_norm: gradients are cut to this norm; 0 for not at all.
        logging_steps: steps between two lines of the log.
        save_steps: steps between two checkpoints.
        save_total_limit: checkpoints that are kept.
        report_to: loggers, such as tensorboard; none for none.
        dataloader_num_workers: processes that read clouds; 0 for the training process itself.
        use_cpu: train on the CPU although there is a GPU.
        seed: of the order of the data and of dropout.
        point_learning_rate: for the point branch where it trains; `learning_rate` is the adapters' and projectors'.
        auto_batch: split every batch over gradient accumulation until it fits the memory; the training is the same.
        memory_limit_gb: use no more GB of a CUDA device than a card of that size has.
        warmup_learning_rate: rate at which the linear warm-up starts; needs `minimum_learning_rate`.
        minimum_learning_rate: rate at which a cosine over the whole run ends, as in the published runs; None for
            `lr_scheduler_type`.
        cuda_graphs: launch forward and backward pass of the decoder as CUDA graphs; batches are filled up to exactly
            `data.pack_tokens` tokens. For one GPU whose host is too slow for it.
        early_stopping_patience: end the run after so many logs without a lower held-out loss (the mean next-token loss
            of the parts that `data.validation` gives), with the weights of the best log; 0 for all steps.
    """

    output_dir: str | None = "runs/align"
    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    logging_steps: float = 5
    logging_nan_inf_filter: bool = False
    save_strategy: str = "steps"
    save_steps: float = 100
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    report_to: str | list[str] | None = "tensorboard"
    resume_from_checkpoint: str | bool | None = None
    dataloader_num_workers: int = 0
    use_cpu: bool = False
    seed: int = 0
    dataloader_pin_memory: bool = False
    point_learning_rate: float | None = None
    auto_batch: bool = False
    memory_limit_gb: float | None = None
    warmup_learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    cuda_graphs: bool = False
    early_stopping_patience: int = 0


@dataclass
class Options:
    """Everything a run depends on.

    Attributes:
        fused, fused_parts: see `pointalign.efficient`.
        recipe: YAML from which `parse` makes the same options again; "" for options put together in a program.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    fused: bool = False
    fused_parts: list[str] | None = None
    recipe: str = ""

    def check(self) -> None:
        """Refuse options that contradict one another, before anything is loaded.

        Raises: ValueError: names the options and says what to change.
        """
        self._check_model()
        self._check_data()
        self._check_training()

    def _check_model(self) -> None:
        model = self.model
        if model.checkpoint is not None and model.point_branch is not None:
            raise ValueError("model.checkpoint brings a point branch already: no model.point_branch beside it")
        if model.dequantize_once and model.quantization == "none":
            raise ValueError("model.dequantize_once needs model.quantization=nf4")
        if not model.train and self.alignment.weight == 0:
            raise ValueError("nothing trains: model.train is empty and alignment.weight is 0")
        trained = [part for part in CACHED_PARTS if part in model.train]
        if trained and (self.data.feature_cache is not None or self.data.views):
            raise ValueError(
                f"data.feature_cache and data.views hold features of a frozen point branch, but model.train has "
                f"{trained[0]}"
            )
        if self.fused_parts is not None and not self.fused:
            raise ValueError("fused_parts are parts of --fused: add --fused")

    def _check_data(self) -> None:
        data, training = self.data, self.training
        if (data.annotations is None) != (data.clouds is None):
            raise ValueError("data.annotations and data.clouds belong together: both, or neither for the embedded set")
        if data.pack_tokens and not data.packing:
            raise ValueError("data.pack_tokens needs data.packing")
        if (data.feature_cache is not None or data.views) and data.augmentation:
            raise ValueError(
                "data.feature_cache and data.views stand for the clouds: no data.augmentation (the views are augmented)"
            )
        if data.views % 2 or data.views < 0:
            raise ValueError(f"data.views={data.views}: expected an even number, half of the views keep the pose")
        if data.fold is not None and (data.annotations is not None or data.evaluate == "validation"):
            raise ValueError("data.fold: of the embedded objects only, without validation (data.evaluate=none or test)")
        if data.mixture and (training.max_steps <= 0 or training.per_device_train_batch_size != 1):
            raise ValueError(
                "data.mixture needs training.max_steps, the length of the run, and "
                "training.per_device_train_batch_size=1, one batch of the mixture"
            )
        if data.mixture and data.pack_tokens:
            raise ValueError(
                "data.mixture has batches of its own: no data.pack_tokens (data.packing lays them in one row)"
            )

    def _check_training(self) -> None:
        data, training = self.data, self.training
        check_arguments(training)
        check_precision(training, self.model.dtype)
        if training.cuda_graphs:
            check_cuda_graphs(training, self.model.dtype, self.model.attention, data.pack_tokens)
        if training.early_stopping_patience < 0:
            raise ValueError("training.early_stopping_patience: expected a number of logs, 0 for none")
        if training.early_stopping_patience:
            if data.validation is None and (data.annotations is not None or data.fold is not None):
                raise ValueError("training.early_stopping_patience needs held-out conversations: data.validation FILE")
            if training.world_size > 1 or training.fsdp:
                raise ValueError(
                    "training.early_stopping_patience needs a run of one process, which alone measures held-out losses"
                )
        if training.fsdp and training.device.type == "cpu":
            raise ValueError("training.fsdp: accelerate shards on GPUs only, on a CPU it would copy without a word")
        if training.auto_batch and data.mixture:
            raise ValueError("training.auto_batch cannot split a batch of data.mixture: lower its batch_size")
        if training.auto_batch and data.pack_tokens:
            raise ValueError("training.auto_batch counts samples, data.pack_tokens tokens: choose one")
        if training.warmup_learning_rate is not None and training.minimum_learning_rate is None:
            raise ValueError(
                "training.warmup_learning_rate belongs to the published schedule: set training.minimum_learning_rate"
            )


def published_rate(step: int, steps: int, warmup_steps: int, warmup: float, peak: float, minimum: float) -> float:
    """Learning rate: linear from `warmup` to `peak`, then a cosine over all steps, warm-up included, to `minimum`."""
    if step < warmup_steps:
        return warmup + (peak - warmup) * step / warmup_steps
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def parse(arguments: list[str], command: str = "train") -> Options:
    """Options from `[RECIPE] [--section.name value ...] [--fused]`.

    RECIPE is a YAML file or the name of a shipped recipe; by default `demo`, or the recipe of the run that the
    arguments resume. An unknown option, a recipe that does not fit, and options that contradict one another end the
    program with a message that names them.
    """
    path, arguments = training_command.prepare(arguments, command)
    parser = parser_of(command)
    parsed = parser.parse_args(["--config", str(path), *arguments])
    try:
        built = parser.instantiate(parsed)
        options = Options(built.model, built.data, built.alignment, built.training, parsed.fused, parsed.fused_parts)
        options.check()
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    options.recipe = parser.dump(parsed, skip_default=True, skip_validation=True)
    return options


@functools.cache
def parser_of(command: str) -> "ArgumentParser":
    """The parser of a recipe's options, made once: to read all signatures takes longer than to parse."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"pointalign {command}", usage=f"pointalign {command} --help", allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ModelOptions, "model")
    parser.add_class_arguments(DataOptions, "data")
    parser.add_class_arguments(AlignmentConfig, "alignment")
    parser.add_class_arguments(TrainingOptions, "training")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--fused_parts", type=list[str] | None)
    return parser
