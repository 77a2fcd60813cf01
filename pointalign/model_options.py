"""The options that say which model and which data: `--model.*` and `--data.*`.

A program that loads a model to ask it needs these alone. Beside those of the Trainer, in `pointalign.options`, they
would bring seconds of imports with them.
"""

from dataclasses import dataclass, field

from pointalign.training_command import PACKAGE

CACHED_PARTS = ("point_encoder", "point_mlp", "qformer", "qformer_lora", "query_tokens", "query_experts")
PARTS = (*CACHED_PARTS, "modality_projector", "lora", "llm_norms")  # a feature cache stands for the first
CHECKPOINTS = PACKAGE / "checkpoints"
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
        system_text: keep the text that some chat templates put into the system turn by themselves, as "You are a
            helpful assistant"; false leaves that turn empty, which saves its tokens. None for how the checkpoint was
            trained, kept if new.
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
    system_text: bool | None = None
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
