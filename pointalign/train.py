"""`python -m pointalign.train [RECIPE.yaml] [--options] [--fused]`: one command from data to a model that answers."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointalign.options import DataOptions, Options

OWN_LOGS = os.environ.get("TENSORBOARD_LOGGING_DIR")  # where the user wants them, if said


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it advertises another package
    from pointalign.options import parse

    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was complete is in {options.training.output_dir}", file=sys.stderr)
        return 130


def keep_freed_memory() -> None:
    """Let glibc reuse large buffers in place of returning them to the system, which costs ten times the computing."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: its own ways may do
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of malloc.h
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 * 2**20)):
        mallopt(option, value)


def run(options: "Options") -> int:
    """Train as the options say. Returns the exit status: 0, or 130 after Ctrl-C."""
    from pointalign import checkpointing, lean, stages
    from pointalign.evaluation.plots import loss_curves
    from pointalign.trainer import checkpoints

    folder = run_folder(options)
    resume = options.training.resume_from_checkpoint
    trainer, model, processor = make_trainer(options)
    main_process = trainer.is_world_process_zero()
    if main_process:
        checkpointing.write_json(folder / "options.json", describe(options))
    evaluation = None
    if options.data.evaluate != "none" and main_process:
        evaluation = Evaluation(options.data, folder)
    if options.training.contrastive_steps:
        warmed = (Path(resume).parent if resume else folder) / "warm-up.safetensors"
        if not resume:
            warm_up(model, processor, options)
            stages.save_stage(model, warmed, describe(options))
        stages.load_stage(model, warmed)  # of what froze since, a checkpoint knows nothing
    if evaluation is not None and options.model.checkpoint is not None:
        evaluation.before(model, processor)

    with lean.training_form(model, options):
        trainer.train(resume_from_checkpoint=resume)
    whole = trainer.whole_state()
    if not main_process:
        return 0
    if trainer.stop.interrupted:
        last = checkpoints(folder)[-1]
        print(
            f"\nstopped at step {trainer.state.global_step}; saved in {last}\n"
            f"go on with --training.resume_from_checkpoint {last}"
        )
        return 130

    if whole is not None:  # this process trained shards: save from a model in one piece
        model, processor = stages.build(options.model, options.data)
        own = checkpointing.stage_state(model)
        for name, tensor in own.items():
            tensor.copy_(whole[f"model.{name}"])
    loss_curves(trainer.state.log_history, folder / "loss.png", options.alignment.weight)
    last = next((entry for entry in reversed(trainer.state.log_history) if "ntp_loss" in entry), None)
    description = describe(options) | {"steps": trainer.state.global_step, "last_log": last}
    stages.save_stage(model, folder / stages.STAGE_FILE, description)
    stages.export(model, processor, folder / "model")
    written = {"loss curves": "loss.png", "stage checkpoint": stages.STAGE_FILE, "model": "model"}
    if evaluation is not None:
        evaluation.after(folder / "model")
        written |= {"accuracy": "accuracy.json", "answers": "answers.md"}
    print("\nwritten:")
    for what, name in written.items():
        print(f"  {what:17} {folder / name}")
    print(f"ask it yourself: python -m pointalign.chat CLOUD --model {folder / 'model'}")
    return 0


def make_trainer(options: "Options") -> tuple[Any, Any, Any]:
    """Trainer, model and processor for the options; the data is checked first, so that nothing bad is found later."""
    from pointalign import lean, memory, stages
    from pointalign.data.check import check
    from pointalign.data.collator import ConversationCollator
    from pointalign.data.mixture import MixtureCollator, MixtureDataset
    from pointalign.data.packing import TokenBudgetSampler, token_counts
    from pointalign.trainer import AlignedModel, PointAlignTrainer

    data, training, mixture = options.data, options.training, options.data.mixture
    if training.fsdp:
        if training.device.type == "cpu":
            raise ValueError("training.fsdp: accelerate shards on GPUs only, on a CPU it would copy without a word")
        # As accelerate does later: 4-bit weights are packed for it while they load.
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    if training.contrastive_steps and data.annotations is not None:
        raise ValueError(
            "training.contrastive_steps teaches a new point encoder the names of the embedded objects: with "
            "data.annotations set it to 0, or take another recipe, such as align"
        )
    if training.memory_limit_gb is not None:
        memory.cap_memory(training.memory_limit_gb, training.device)
    if mixture and (training.max_steps <= 0 or training.per_device_train_batch_size != 1):
        raise ValueError(
            "data.mixture needs training.max_steps, the length of the run, and "
            "training.per_device_train_batch_size=1, one batch of the mixture"
        )
    if mixture and data.pack_tokens:
        raise ValueError("data.mixture has batches of its own: no data.pack_tokens (data.packing lays them in one row)")
    if options.alignment.span == "release" and data.packing:
        raise ValueError("alignment.span=release is a place of padded rows: no data.packing")
    if data.annotations is None:
        stages.require_fold(options.model.checkpoint, data.fold)
    datasets = make_datasets(options)
    model, processor = stages.build(options.model, data)
    features = lean.open_cache(model, processor.feature_extractor, options)
    for one in datasets:
        if features is None:
            report = check(one, processor.feature_extractor.min_points, data.skip_bad)
        else:
            features.require(object_id for ids in one.conversations.object_ids for object_id in ids)
            report = f"{len(features)} objects in the feature cache {features.folder}"
        if int(os.environ.get("RANK", 0)) == 0:
            print(report)
    if not options.model.train and options.alignment.weight == 0:
        raise ValueError("nothing trains: model.train is empty and alignment.weight is 0")
    aligned = AlignedModel(model, options.alignment, choose_impl(options.fused))
    collator = ConversationCollator(processor, data.max_length, data.augmentation, data.packing, features)
    dataset = datasets[0]
    if mixture:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        num_batches = training.max_steps * training.gradient_accumulation_steps * ranks
        ratios, sizes = [one.ratio for one in mixture], [one.batch_size for one in mixture]
        dataset = MixtureDataset(datasets, ratios, sizes, num_batches, training.seed)
        collator = MixtureCollator(collator)
    with lean.training_form(model, options) as parts:
        budget = None if training.fsdp else lean.plan_memory(aligned, dataset, collator, options)
    sampler = None
    if data.pack_tokens:
        lengths = token_counts(processor, datasets[0].conversations, data.max_length)
        sampler = TokenBudgetSampler(
            lengths, data.pack_tokens, training.seed, training.process_index, training.world_size
        )
    if training.process_index == 0:
        print(budget or "no memory plan: FSDP shares the model out, the log shows the peak")
        if options.fused:
            print("fused: " + ", ".join(f"{part} ({count})" for part, count in parts.items()))
        if training.auto_batch:
            print(
                f"auto_batch: {training.per_device_train_batch_size} samples at a time, "
                f"{training.gradient_accumulation_steps} times for a step"
            )
    trainer = PointAlignTrainer(
        model=aligned,
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        point_learning_rate=training.point_learning_rate,
        batch_sampler=sampler,
    )
    return trainer, model, processor


def make_datasets(options: "Options") -> list[Any]:
    """The data set, or one for every part of the mixture."""
    from pointalign.data.dataset import ConversationDataset

    annotations, clouds = data_paths(options)
    parts = [(one.annotations or annotations, one.types) for one in options.data.mixture]
    parts = parts or [(annotations, options.data.types)]
    read_clouds = options.data.feature_cache is None
    return [ConversationDataset(path, clouds, types, options.data.up_axis, read_clouds) for path, types in parts]


def data_paths(options: "Options") -> tuple[Path, Path | list[Path]]:
    """Annotation file and folders of clouds: the user's, or the embedded objects'."""
    clouds = options.data.clouds
    if options.data.annotations is not None and clouds is not None:
        return Path(options.data.annotations), [Path(one) for one in ([clouds] if isinstance(clouds, str) else clouds)]
    from pointalign import assets

    furniture = assets.furniture(options.data.fold)
    return furniture / "annotations" / "train.json", furniture / "clouds"


def run_folder(options: "Options") -> Path:
    """The run's folder; a finished run is never overwritten: a free number is appended."""
    folder = Path(options.training.output_dir or "runs/align")
    if options.training.resume_from_checkpoint is None and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        number, wanted = 2, folder
        while folder.exists() and any(folder.iterdir()):
            folder = wanted.with_name(f"{wanted.name}-{number}")
            number += 1
    options.training.output_dir = str(folder)
    os.environ["TENSORBOARD_LOGGING_DIR"] = OWN_LOGS or str(folder / "tensorboard")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def choose_impl(fused: bool) -> str:
    """`auto` under --fused where a fused alignment loss can run, else `reference`, said in one line."""
    if not fused:
        return "reference"
    import torch

    from pointalign_kernels import fused_available

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if fused_available(device):
        return "auto"
    print(f"--fused: no fused alignment loss runs on {device}; the plain-PyTorch reference is used")
    return "reference"


def describe(options: "Options") -> dict[str, Any]:
    """The options as JSON values, with the versions they ran under."""
    import platform
    from dataclasses import asdict, fields

    import torch
    import transformers

    from pointalign import checkpointing

    values = {one.name: (getattr(options.training, one.name), one.default) for one in fields(options.training)}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    described = {
        "model": asdict(options.model),
        "data": asdict(options.data),
        "alignment": asdict(options.alignment),
        "training": changed,
        "fused": options.fused,
        "fused_parts": options.fused_parts,
        "versions": versions,
        "data_sha256": file_hash(data_paths(options)[0]),
        "commit": checkpointing.commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }
    return json.loads(json.dumps(described, default=str))


def file_hash(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def warm_up(model: Any, processor: Any, options: "Options") -> None:
    from pointalign import assets, contrastive
    from pointalign.evaluation.naming import load_objects

    objects = load_objects(assets.furniture(options.data.fold), "train")
    contrastive.warm_up(
        model,
        processor,
        objects.clouds,
        objects.records,
        options.training.contrastive_steps,
        options.training.contrastive_batch_size,
        options.training.contrastive_learning_rate,
        options.training.device,
    )


class Evaluation:
    """Held-out objects before and after training, beside the baselines; and ten questions with their answers."""

    def __init__(self, data: "DataOptions", folder: Path):
        from pointalign import assets
        from pointalign.evaluation import naming

        objects = assets.furniture(data.fold)
        self.split, self.folder = data.evaluate, folder
        self.held_out = naming.load_objects(objects, self.split)
        self.training = naming.load_objects(objects, "train")
        self.results: dict[str, Any] = {}

    def before(self, model: Any, processor: Any) -> None:
        from pointalign.evaluation import naming

        answers = naming.name_all(model, processor, self.held_out.clouds, "naming before training")
        self.results["model before training"] = naming.correct(answers, self.held_out)

    def after(self, exported: Path) -> None:
        """Evaluate the model as it was written, not as it stood in memory."""
        import numpy as np

        from pointalign import checkpointing
        from pointalign.evaluation import baselines, naming, samples
        from pointalign.stages import load_for_inference

        model, processor = load_for_inference(exported)
        clouds = self.held_out.clouds
        inputs = {
            "model": clouds,
            "model, random yaw": baselines.random_yaw(clouds),
            "model, shuffled clouds": [clouds[i] for i in naming.shuffled(len(clouds))],
        }
        answers = {name: naming.name_all(model, processor, given, name) for name, given in inputs.items()}
        self.results |= {name: naming.correct(given, self.held_out) for name, given in answers.items()}
        self.results |= naming.controls(self.held_out, self.training)
        known = np.isin(self.held_out.nouns, self.training.nouns)
        report = naming.report(self.results, self.held_out.families, known)
        per_object = [
            {
                "object_id": record["object_id"],
                "family": record["family"],
                "truth": record["head_noun"],
                "noun_in_training": bool(known[row]),
                "answer": answers["model"][row],
                "right": [name for name, correct in self.results.items() if correct[row]],
            }
            for row, record in enumerate(self.held_out.records)
        ]
        checkpointing.write_json(
            self.folder / "accuracy.json", {"split": self.split} | report.as_dict() | {"objects": per_object}
        )
        print(f"\n{self.split} objects, never seen in training; 95 % intervals clustered by family\n{report.table()}\n")
        text = samples.ask_ten(model, processor, self.held_out)
        (self.folder / "answers.md").write_text(text)
        print(text)


if __name__ == "__main__":
    sys.exit(main())
