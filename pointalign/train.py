"""`pointalign train [RECIPE.yaml] [--options] [--fused]`: one command from data to a model that answers."""

import json
import os
import shlex
import shutil
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointalign import command_line, training_command
from pointalign.allocator import keep_freed_memory

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from pointalign.data.dataset import ConversationDataset
    from pointalign.feature_cache import FeatureCache
    from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
    from pointalign.options import Options, TrainingOptions
    from pointalign.trainer import PointAlignTrainer


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if arguments is None else arguments
    return command_line.run(lambda: start(arguments), "stopped before anything was computed")


def start(arguments: list[str]) -> int:
    training_command.prepare(arguments)  # help and errors of spelling come before torch is imported
    keep_freed_memory()
    from pointalign import run_folder
    from pointalign.options import parse

    options = parse(arguments)
    auto = options.training.resume_from_checkpoint == "auto"
    with ExitStack() as held:  # the lock of the run's folder
        try:
            folder = run_folder.run_folder(options, held)
        except run_folder.FinishedRun as finished:
            if not auto:
                raise
            print(finished)  # a job that is started again and again ends here
            return 0
        try:
            return run(options, folder)
        except KeyboardInterrupt:
            print(f"\nstopped: {run_folder.what_is_saved(folder)}", file=sys.stderr)
            return command_line.STOPPED


def run(options: "Options", folder: Path) -> int:
    """Train as the options say, in the run's folder.

    Returns: The exit status: 0, or 128 and the number of the signal that stopped it, as 130 after Ctrl-C.
    """
    from pointalign import run_checkpoints, run_folder, storage
    from pointalign.efficient import training_form
    from pointalign.efficient.graphs import decoder_in_graphs
    from pointalign.evaluation.held_out import HeldOutReport

    trainer, model, processor = make_trainer(options)
    main_process = trainer.is_world_process_zero()
    if main_process:
        if checkpoint := options.training.resume_from_checkpoint:  # refused before the folder changes
            manifest = run_checkpoints.verify(Path(checkpoint))
            run_checkpoints.differences(manifest["run"], trainer.depends_on, Path(checkpoint))
        storage.write_json(folder / run_folder.OPTIONS, describe(options) | trained_in(trainer))
        if options.recipe:
            with storage.replacing(folder / training_command.RUN_RECIPE) as temporary:
                temporary.write_text(options.recipe, encoding="utf-8")
    evaluation = None
    if options.data.evaluate != "none" and main_process:
        evaluation = HeldOutReport(options.data.fold, options.data.evaluate, folder)
    if evaluation is not None and options.model.checkpoint is not None:
        evaluation.before(model, processor)

    graphs = decoder_in_graphs(model.get_decoder()) if options.training.cuda_graphs else nullcontext()
    with training_form(model, options), graphs:
        trainer.train(resume_from_checkpoint=options.training.resume_from_checkpoint)
    gathered = trainer.gathered_state()
    if trainer.stop.number:
        if main_process:
            print(f"\nstopped at step {trainer.state.global_step}; saved in {trainer.checkpoints[-1]}")
            print(f"go on with: {run_folder.resume_command(trainer.checkpoints[-1], options.training.world_size)}")
        return 128 + trainer.stop.number
    if not main_process:
        return 0
    if gathered is not None:  # this process trained shards: save from a complete model
        model, processor = complete_model(options, trained_in(trainer)["dtype"], gathered)
    if evaluation is not None:
        evaluation.calibrate(model, processor)
    written = write_results(trainer, model, processor, options, folder)
    if evaluation is not None:
        evaluation.after(folder / "model")
        written |= {"accuracy": "accuracy.json", "answers": "answers.md", "answers, pictures": "answers.png"}
    write_cards(options, trainer, folder)
    print("\nwritten:")
    for name, file in written.items():
        print(f"  {name:17} {folder / file}")
    chat = f"{command_line.program()} chat {example_cloud(trainer, options)}"
    print(f"ask it yourself: {chat} --model {shlex.quote(str(folder / 'model'))}")
    return 0


# -- before training ---------------------------------------------------------------------------------------------------


def make_trainer(
    options: "Options",
) -> "tuple[PointAlignTrainer, PointAlignForConditionalGeneration, PointAlignProcessor]":
    """Trainer, model and processor for the options. Options and data are checked first, before anything is computed.

    Raises:
        FileNotFoundError: a file or folder that the options name is missing.
        ValueError: options contradict one another, data is bad, or not even one sample fits the memory.
    """
    from pointalign import build, stage_file
    from pointalign.data.collator import ConversationCollator, TokenBudgetSampler, token_counts
    from pointalign.data.dataset import MixtureCollator, make_datasets
    from pointalign.efficient import memory, training_form
    from pointalign.held_out_losses import HeldOutLosses
    from pointalign.trainer import AlignedModel, PointAlignTrainer
    from pointalign.training_dtype import training_dtype

    data, training = options.data, options.training
    options.check()
    prepare_device(training)
    if data.annotations is None:
        stage_file.require_fold(options.model.checkpoint or options.model.point_branch, data.fold)
    if data.views and data.feature_cache is None:
        data.feature_cache = str(Path(training.output_dir or "runs") / "features")
    build.require_trained_parts(options.model)
    if not stage_file.keeps_system_text(options.model):
        options.model.system_text = False  # recorded for those who go on from this run
    datasets = make_datasets(options)
    dtype = training_dtype(options)
    model, processor = build.build_model(replace(options.model, dtype=dtype), data)
    features = point_features(model, processor, datasets, options)
    check_data(datasets, processor, features, options)
    aligned = AlignedModel(model, options.alignment, choose_impl(options.fused))
    collator = ConversationCollator(processor, data.max_length, data.augmentation, data.packing, features, data.views)
    with training_form(model, options) as parts:
        budget = None
        if not training.fsdp:
            longest = memory.largest_batch(datasets, processor, options)
            budget = memory.plan_memory(aligned, longest, collator, options)
    sampler = None
    if data.pack_tokens:
        lengths = token_counts(processor, datasets[0].conversations, data.max_length)
        sampler = TokenBudgetSampler(
            lengths, data.pack_tokens, training.seed, training.process_index, training.world_size
        )
        if training.cuda_graphs:
            collator.shape = sampler.shape
    if training.process_index == 0:
        print(budget or "no memory plan: FSDP shards the model, the log shows the peak")
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
        train_dataset=mixture_of(datasets, options) if data.mixture else datasets[0],
        data_collator=MixtureCollator(collator) if data.mixture else collator,
        point_learning_rate=training.point_learning_rate,
        batch_sampler=sampler,
        depends_on=depends_on(options, model, dtype),
        budget=budget,
    )
    if held_out := HeldOutLosses.of(trainer, aligned, processor, options):
        trainer.add_callback(held_out)
        if training.early_stopping_patience:
            trainer.stop_early(training.early_stopping_patience)
    return trainer, model, processor


def prepare_device(training: "TrainingOptions") -> None:
    """One GPU a process, no more memory than allowed, and the mark that 4-bit weights are to be packed for FSDP.

    Without torchrun and with several GPUs the Trainer would wrap the model in `nn.DataParallel`, which cannot replicate
    the hooks of the alignment loss.
    """
    from pointalign.efficient import memory

    if training.n_gpu > 1:
        print(
            f"training on 1 of {training.n_gpu} GPUs; for all of them: torchrun --nproc_per_node {training.n_gpu} "
            f"-m pointalign.train, with the same arguments"
        )
        training._n_gpu = 1  # what `TrainingArguments.n_gpu` returns
    if training.fsdp:
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate does later, when the weights are loaded already
    if training.memory_limit_gb is not None:
        memory.cap_memory(training.memory_limit_gb, training.device)


def point_features(
    model: "PointAlignForConditionalGeneration",
    processor: "PointAlignProcessor",
    datasets: "list[ConversationDataset]",
    options: "Options",
) -> "FeatureCache | None":
    """The feature cache that the options name, or None; one of augmented views is completed first."""
    from pointalign import feature_cache

    data, training = options.data, options.training
    if data.views:
        with training.main_process_first(local=False, desc="encoding clouds"):
            if training.process_index == 0:
                try:
                    feature_cache.write_for(options, model, processor, datasets, training.device)
                except feature_cache.StaleCacheError:
                    begun = Path(data.feature_cache) == Path(str(training.output_dir)) / "features"
                    if training.resume_from_checkpoint or not begun:
                        raise
                    shutil.rmtree(data.feature_cache)  # of a run with other options, stopped before its first step
                    feature_cache.write_for(options, model, processor, datasets, training.device)
    return feature_cache.open_cache(model, processor.feature_extractor, options)


def check_data(
    datasets: "list[ConversationDataset]",
    processor: "PointAlignProcessor",
    features: "FeatureCache | None",
    options: "Options",
) -> None:
    """Check every cloud, or that the feature cache has every object, and the lengths; the first process reports.

    Raises: ValueError: clouds are bad, features missing, or samples too long to be cut.
    """
    from pointalign.data.check import check
    from pointalign.data.collator import check_lengths
    from pointalign.feature_cache import entries

    for dataset in datasets:
        if features is None:
            report = check(dataset, processor.feature_extractor.min_points, options.data.skip_bad)
        else:
            features.require(entries([dataset], options.data.views))
            report = f"{len(features)} entries in the feature cache {features.folder}"
        lengths = check_lengths(dataset, processor, options.data.max_length, options.data.skip_long)
        report = f"{report}\n{lengths}" if lengths else report
        if options.training.process_index == 0:
            print(report)


def mixture_of(datasets: "list[ConversationDataset]", options: "Options") -> "Dataset":
    """Batches of the mixture for all steps, micro-batches and processes of the run."""
    from pointalign.data.dataset import MixtureDataset

    training, parts = options.training, options.data.mixture
    num_batches = training.max_steps * training.gradient_accumulation_steps * training.world_size
    return MixtureDataset(
        datasets, [part.ratio for part in parts], [part.batch_size for part in parts], num_batches, training.seed
    )


def choose_impl(fused: bool) -> str:
    """`auto` under --fused where a fused alignment loss can run, else `reference`, which it then says."""
    if not fused:
        return "reference"
    import torch

    from pointalign_kernels import fused_available

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if fused_available(device):
        return "auto"
    print(f"--fused: no fused alignment loss runs on {device}; the plain-PyTorch reference is used")
    return "reference"


# -- after training ----------------------------------------------------------------------------------------------------


def complete_model(
    options: "Options", dtype: str, state: "dict[str, Tensor]"
) -> "tuple[PointAlignForConditionalGeneration, PointAlignProcessor]":
    """A model in this process alone, with what an `AlignedModel` trained, and its processor."""
    from pointalign import build, stage_file

    model, processor = build.build_model(replace(options.model, dtype=dtype), options.data)
    for name, tensor in stage_file.stage_state(model).items():
        tensor.copy_(state[f"model.{name}"])
    return model, processor


def write_results(
    trainer: "PointAlignTrainer",
    model: "PointAlignForConditionalGeneration",
    processor: "PointAlignProcessor",
    options: "Options",
    folder: Path,
) -> dict[str, str]:
    """Loss curves, stage file, adapter and exported model. Returns the names of the files by what they are."""
    from pointalign import build, model_card, stage_file
    from pointalign.early_stopping import standing
    from pointalign.evaluation.report import loss_curves

    history = trainer.state.log_history
    loss_curves(history, folder / "loss.png", options.alignment.weight)
    last = next((entry for entry in reversed(history) if "ntp_loss" in entry), None)
    description = describe(options) | trained_in(trainer) | {"steps": trainer.state.global_step, "last_log": last}
    if trainer.early_stopping is not None:
        description["best_step"], description["held_out_loss"], _ = standing(history)
    stage_file.save_stage(model, folder / stage_file.STAGE_FILE, description)
    written = {"loss curves": "loss.png", "stage checkpoint": stage_file.STAGE_FILE, "model": "model"}
    if model_card.write_adapter(model, folder / "adapter", options.model.llm):
        written["adapter"] = "adapter"
    build.export(model, processor, folder / "model")
    return written


def write_cards(options: "Options", trainer: "PointAlignTrainer", folder: Path) -> None:
    """The model cards of the exported model and its adapter, with the results of the run."""
    from pointalign import model_card, stage_file
    from pointalign.model_options import CHECKPOINTS

    start = options.model.checkpoint or options.model.point_branch
    shipped = start is not None and stage_file.find_stage(start).parent == CHECKPOINTS
    model_card.write(folder, describe(options) | {"steps": trainer.state.global_step}, shipped)


def example_cloud(trainer: "PointAlignTrainer", options: "Options") -> str:
    """A cloud of the user's to ask about, as it is typed in a shell; `CLOUD` where there is none."""
    from pointalign.data.dataset import find_cloud
    from pointalign.data.point_cloud import PointCloudError

    dataset: Any = getattr(trainer.train_dataset, "datasets", [trainer.train_dataset])[0]
    names = next((ids for ids in dataset.conversations.object_ids if ids), None)
    if options.data.annotations is None or names is None:
        return "CLOUD"
    try:
        return shlex.quote(str(find_cloud(dataset.clouds, names[0])))
    except PointCloudError:  # a training from cached features needs no clouds
        return "CLOUD"


def depends_on(options: "Options", model: "PointAlignForConditionalGeneration", dtype: str) -> dict[str, Any]:
    """What the checkpoints of a run can be resumed with: its options, and hashes of what the options name by path.

    Args:
        dtype: that the run trains in; it stands in the place of `auto`.
    """
    from pointalign import stage_file, storage

    training, start = options.training, options.model.checkpoint or options.model.point_branch
    described = describe(options)
    described["model"]["dtype"] = dtype
    return described | {
        "language_model": getattr(model.model.language_model, "weights_fingerprint", None),
        "start_sha256": storage.file_hash(stage_file.find_stage(start)) if start else None,
        "processes": training.world_size,
        "samples_per_step": training.per_device_train_batch_size * training.gradient_accumulation_steps,
    }


def trained_in(trainer: "PointAlignTrainer") -> dict[str, str]:
    """The dtype of the language model in this run; `model.dtype` may be `auto`, so that a GPU loads what fits it."""
    return {"dtype": trainer.depends_on["model"]["dtype"]}


def describe(options: "Options") -> dict[str, Any]:
    """The options as JSON values, with the origin of the run: versions, commit, device, hash of the annotations."""
    from dataclasses import asdict, fields

    from pointalign import storage
    from pointalign.data.dataset import data_paths

    values = {field.name: (getattr(options.training, field.name), field.default) for field in fields(options.training)}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    origin = storage.provenance(options.training.device)
    described = {
        "model": asdict(options.model),
        "data": asdict(options.data),
        "alignment": asdict(options.alignment),
        "training": changed,
        "fused": options.fused,
        "fused_parts": options.fused_parts,
        "versions": {name: origin[name] for name in ("python", "torch", "transformers")},
        "data_sha256": storage.file_hash(data_paths(options)[0]),
        **{name: origin[name] for name in ("commit", "uncommitted_changes", "device")},
    }
    return json.loads(json.dumps(described, default=str))


if __name__ == "__main__":
    sys.exit(main())
