"""The options of a training run: one dotted namespace over one YAML recipe, and every check across options."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from pointalign import training_command
from pointalign.alignment import AlignmentConfig
from pointalign.training_checks import check_arguments, check_precision

CACHED_PARTS = ("point_encoder", "point_mlp", "qformer", "qformer_lora", "query_tokens", "query_experts")
PARTS = (*CACHED_PARTS, "modality_projector", "lora", "llm_norms")  # a feature cache stands for the first
RECIPES = training_command.RECIPES
CHECKPOINTS = Path(__file__).parent / "checkpoints"
READING_OPTIONS = ("missing_color", "max_nonfinite", "parts")  # of `data`: how files are read


@dataclass
class ModelOptions:
    """What is trained (`--model.*`).

    Attributes:
        llm: folder of a causal language model, or its name on the Hugging Face hub; `smollm2`, the embedded one; or a
            folder that `pointalign.convert` wrote, which has a point branch and may have adapters.
        preset: sizes of the point branch, `mini` or `minigpt3d-phi2`.
        checkpoint: point branch and adapters to start from: a stage file (.safetensors), a run's folder, or the name of
            a shipped one. None draws them at random.
        point_branch: like `checkpoint`, but only its encoder, point MLP and Q-Former, in front of another language
            model; the modality projector is drawn at random and must train.
        train: parts that train, of point_encoder, point_mlp, qformer (its queries included), qformer_lora (and the
            Q-Former's norms), query_tokens, query_experts, modality_projector, lora, llm_norms (of the published Phi).
        dtype: of the language model's frozen weights: float32, bfloat16, or float16 (with `training.fp16`); `auto` is
            bfloat16 where the hardware computes in it, else float32; a training on a CPU measures which is faster.
        lora_rank: of the adapters on the language model's linear layers; 0 for none.
        lora_alpha: the adapters act at strength lora_alpha / lora_rank.
        lora_dropout: share of the adapters' inputs that is dropped in training.
        lora_targets: names of the layers that are adapted, or all-linear.
        qformer_lora_rank: of adapters on the Q-Former, with twice the rank as alpha; 0 for none.
        query_experts: number of query experts, which start as copies of the queries; 0 adds none.
        query_routing: of query experts: sparse, soft or constant; None for how they were trained, sparse if new.
        seed: of a point branch drawn at random.
        quantization: of the language model's frozen weights, `none` or `nf4` (4 bits, by bitsandbytes).
        dequantize_once: round to 4 bits, then store the result in `dtype`: faster, where memory allows.
        attention: `auto`, `eager`, `sdpa`, `varlen` (packed batches) or `flash_attention_2`.
    """

    llm: str = "smollm2"
    preset: str = "mini"
    checkpoint: str | None = None
    point_branch: str | None = None
    train: list[str] = field(default_factory=lambda: ["lora"])
    dtype: str = "auto"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: str | list[str] = "all-linear"
    qformer_lora_rank: int = 0
    query_experts: int = 0
    query_routing: str | None = None
    seed: int = 0
    quantization: str = "none"
    dequantize_once: bool = False
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.quantization not in ("none", "nf4"):
            raise ValueError(f"model.quantization={self.quantization!r}: expected none or nf4")
        if self.query_routing not in (None, "sparse", "soft", "constant"):
            raise ValueError(f"model.query_routing={self.query_routing!r}: expected sparse, soft or constant")
        unknown = sorted(set(self.train) - set(PARTS))
        if unknown:
            raise ValueError(f"model.train: unknown part {unknown[0]!r}, expected of {', '.join(PARTS)}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"model.dtype={self.dtype!r}: expected auto, float32, bfloat16 or float16")


@dataclass
class MixturePart:
    """One part of a mixture: conversations of some types, how often a batch is drawn from them, and its size.

    Attributes:
        types: conversation types, or kinds of question that the entries name; None means all.
        ratio: weight of this part among all.
        batch_size: samples per batch.
        annotations: file of this part, by default `data.annotations`.
    """

    types: list[str] | None = None
    ratio: float = 1.0
    batch_size: int = 8
    annotations: str | None = None


@dataclass
class DataOptions:
    """What it is trained on (`--data.*`). Without paths, the embedded objects.

    Attributes:
        annotations: training conversations, JSON in the PointLLM schema.
        clouds: folder of `{object_id}_8192.npy` or other point and mesh files, or several.
        mixture: parts that every batch is drawn from, one part a batch; needs `training.max_steps` and
            `training.per_device_train_batch_size=1`, the batch of a step being one part's.
        types: conversation types or kinds of question; all by default.
        up_axis: vertical axis of the clouds: x, y, z, -x, -y or -z; see docs/data.md for published weights and clouds.
        missing_color: colour of points that have none: black (what the published encoders saw of ModelNet40), grey or
            white.
        max_nonfinite: the largest share of NaN or infinite points that is left out of a cloud; with more, it is bad.
        parts: what is used of a file that holds points and surfaces: points, mesh or all.
        num_points: the most points of a cloud that are used; by default what the point encoder is made for.
        max_length: the most tokens of a sample.
        augmentation: resample, turn, scale and jitter clouds.
        packing: lay the samples of a batch end to end in one row, instead of padding them to the longest.
        pack_tokens: fill every packed batch up to so many tokens, with as many samples as fit; 0 for
            `training.per_device_train_batch_size` samples.
        feature_cache: folder written by `pointalign features`, read instead of the clouds.
        views: augmented views of every object in the feature cache, half of them in the object's pose; 0 for the
            clouds as they are. A run without `feature_cache` then writes one into its folder first.
        validation: annotations, of objects in `clouds`, whose losses are logged during training and never trained on;
            for the embedded objects those of their validation part.
        skip_bad: leave out objects that cannot be read, named and counted, instead of stopping.
        skip_long: leave out samples that `max_length` would cut through a cloud or down to no answer, named and
            counted, instead of stopping; longer answers are cut.
        fold: of the embedded objects, hold out this fold of five, 0 to 4, instead of the committed split; a fold has
            no validation part.
        evaluate: held-out questions at the end of the run: `none`, or the `validation` or `test` part of the embedded
            objects.
    """

    annotations: str | None = None
    clouds: str | list[str] | None = None
    mixture: list[MixturePart] = field(default_factory=list)
    types: list[str] | None = None
    up_axis: str = "y"
    missing_color: str = "black"
    max_nonfinite: float = 0.05
    parts: str = "points"
    num_points: int | None = None
    max_length: int = 512
    augmentation: bool = False
    packing: bool = False
    pack_tokens: int = 0
    feature_cache: str | None = None
    views: int = 0
    skip_bad: bool = False
    skip_long: bool = False
    validation: str | None = None
    fold: int | None = None
    evaluate: str = "none"

    def __post_init__(self) -> None:
        if self.evaluate not in ("none", "validation", "test"):
            raise ValueError(f"data.evaluate={self.evaluate!r}: expected none, validation or test")
        if self.missing_color not in ("black", "grey", "white"):
            raise ValueError(f"data.missing_color={self.missing_color!r}: expected black, grey or white")
        if not 0 <= self.max_nonfinite < 1:
            raise ValueError(f"data.max_nonfinite={self.max_nonfinite}: expected a share from 0 to below 1")
        if self.parts not in ("points", "mesh", "all"):
            raise ValueError(f"data.parts={self.parts!r}: expected points, mesh or all")


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
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"pointalign {command}", usage=f"pointalign {command} --help", allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ModelOptions, "model")
    parser.add_class_arguments(DataOptions, "data")
    parser.add_class_arguments(AlignmentConfig, "alignment")
    parser.add_class_arguments(TrainingOptions, "training")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--fused_parts", type=list[str] | None)
    parsed = parser.parse_args(["--config", str(path), *arguments])
    try:
        built = parser.instantiate(parsed)
        options = Options(built.model, built.data, built.alignment, built.training, parsed.fused, parsed.fused_parts)
        options.check()
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    options.recipe = parser.dump(parsed, skip_default=True)
    return options
