"""`python -m pointalign.train [RECIPE.yaml] [--options] [--fused]`: one command from data to a model that answers."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointalign.options import Options

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
    from pointalign import build, stage_file, storage
    from pointalign.efficient.training_form import training_form
    from pointalign.evaluation.naming import HeldOutNaming
    from pointalign.evaluation.plots import loss_curves
    from pointalign.trainer import checkpoints

    folder = run_folder(options)
    resume = options.training.resume_from_checkpoint
    trainer, model, processor = make_trainer(options)
    main_process = trainer.is_world_process_zero()
    if main_process:
        storage.write_json(folder / "options.json", describe(options))
    evaluation = None
    if options.data.evaluate != "none" and main_process:
        evaluation = HeldOutNaming(options.data.fold, options.data.evaluate, folder)
    if options.training.contrastive_steps:
        warmed = (Path(resume).parent if resume else folder) / "warm-up.safetensors"
        if not resume:
            warm_up(model, processor, options)
            stage_file.save_stage(model, warmed, describe(options))
        stage_file.load_stage(model, warmed)  # of what froze since, a checkpoint knows nothing
    if evaluation is not None and options.model.checkpoint is not None:
        evaluation.before(model, processor)

    with training_form(model, options):
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
        model, processor = build.build_model(options.model, options.data)
        own = stage_file.stage_state(model)
        for name, tensor in own.items():
            tensor.copy_(whole[f"model.{name}"])
    loss_curves(trainer.state.log_history, folder / "loss.png", options.alignment.weight)
    last = next((entry for entry in reversed(trainer.state.log_history) if "ntp_loss" in entry), None)
    description = describe(options) | {"steps": trainer.state.global_step, "last_log": last}
    stage_file.save_stage(model, folder / stage_file.STAGE_FILE, description)
    build.export(model, processor, folder / "model")
    written = {"loss curves": "loss.png", "stage checkpoint": stage_file.STAGE_FILE, "model": "model"}
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
    from pointalign import build, stage_file
    from pointalign.data.check import check
    from pointalign.data.collator import ConversationCollator, TokenBudgetSampler, token_counts
    from pointalign.data.dataset import MixtureCollator, MixtureDataset, make_datasets
    from pointalign.efficient import memory
    from pointalign.efficient.training_form import training_form
    from pointalign.feature_cache import open_cache
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
        stage_file.require_fold(options.model.checkpoint, data.fold)
    datasets = make_datasets(options)
    model, processor = build.build_model(options.model, data)
    features = open_cache(model, processor.feature_extractor, options)
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
    with training_form(model, options) as parts:
        budget = None if training.fsdp else memory.plan_memory(aligned, dataset, collator, options)
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

    from pointalign import storage
    from pointalign.data.dataset import data_paths

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
        "commit": storage.commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }
    return json.loads(json.dumps(described, default=str))


def file_hash(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def warm_up(model: Any, processor: Any, options: "Options") -> None:
    from pointalign import assets
    from pointalign.embedded import warm_up
    from pointalign.evaluation.objects import embedded_objects

    objects = embedded_objects(assets.embedded_objects(options.data.fold), "train")
    warm_up.warm_up_point_branch(
        model,
        processor,
        objects.clouds,
        objects.records,
        options.training.contrastive_steps,
        options.training.contrastive_batch_size,
        options.training.contrastive_learning_rate,
        options.training.device,
    )


if __name__ == "__main__":
    sys.exit(main())
