"""Checkpoints are complete, verified, newest first, and only for the run that wrote them."""

import json
import os
import resource
import signal

import pytest
import torch
from test_trainer import StopAfter, make_trainer

from pointalign import run_checkpoints, storage
from pointalign.run_checkpoints import CheckpointError, checkpoints, differences, find, newest, publish, verify

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def write_checkpoint(run, step: int, **depends_on):
    unfinished = run / run_checkpoints.UNFINISHED / f"checkpoint-{step}"
    storage.write_json(unfinished / "trainer_state.json", {"global_step": step})
    storage.write_tensors(unfinished / "model.safetensors", {"weight": torch.arange(64.0)})
    publish(unfinished, run / unfinished.name, depends_on)
    return run / unfinished.name


# -- complete or absent ------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (events.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", str(b))), replace(a, b)))
    checkpoint = write_checkpoint(tmp_path, 5)
    renamed = events.index(("rename", str(checkpoint)))
    unfinished = tmp_path / run_checkpoints.UNFINISHED / checkpoint.name
    files = {str(unfinished / path.name) for path in checkpoint.iterdir()}
    assert len(files) == 3 and files | {str(unfinished)} <= set(events[:renamed])
    assert events[-1] == str(tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(data)


def change_format(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("model.safetensors", flip),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:200])),
        ("trainer_state.json", lambda path: path.write_text("{}")),
        ("trainer_state.json", lambda path: path.unlink()),
        ("manifest.json", lambda path: path.unlink()),
        ("manifest.json", lambda path: path.write_text("[" * 100_000)),
        ("manifest.json", lambda path: path.write_text('{"format": 1, "files": {"a": 5}, "run": {}}')),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("manifest.json", change_format),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_file_named(name, spoil, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 5)
    verify(checkpoint)
    spoil(checkpoint / name)
    with pytest.raises(CheckpointError, match=name):
        verify(checkpoint)


def test_a_damaged_checkpoint_is_found_before_anything_is_loaded(tmp_path, processor, clouds):
    make_trainer(tmp_path, processor, clouds, max_steps=1, **EVERY_STEP).train()
    flip(tmp_path / "checkpoint-1" / "optimizer.safetensors")
    trainer = make_trainer(tmp_path, processor, clouds, max_steps=2, **EVERY_STEP)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.skipif(os.name != "posix", reason="the size of files is limited on POSIX systems")
def test_a_full_disk_is_one_clear_error(tmp_path, processor, clouds):
    """A limit on file sizes stands for the disk: safetensors then raises an error that is no OSError."""
    trainer = make_trainer(tmp_path, processor, clouds, max_steps=2, **EVERY_STEP)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint-1 could not be written.*model.safetensors"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert checkpoints(tmp_path) == [] and not (tmp_path / run_checkpoints.UNFINISHED).exists()


def test_leftovers_of_a_killed_run_are_cleaned_and_folders_of_the_user_stay(tmp_path, processor, clouds):
    for name in (".incomplete/checkpoint-7", ".superseded-checkpoint-1", ".checkpoint-3.previous", "checkpoint-best"):
        (tmp_path / name).mkdir(parents=True)
    make_trainer(tmp_path, processor, clouds, max_steps=2, save_total_limit=1, **EVERY_STEP).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-best"]


# -- which checkpoint --------------------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_was_written_last_and_skipped_ones_are_named(tmp_path):
    for step in (6, 9, 5):  # 5 after going back to an earlier one
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12").mkdir()
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-5"
    flip(tmp_path / "checkpoint-5" / "model.safetensors")
    checkpoint, skipped = newest(tmp_path)
    assert checkpoint == tmp_path / "checkpoint-9"
    assert len(skipped) == 2 and "checkpoint-5" in skipped[0] and "damaged" in skipped[0]
    assert "checkpoint-12" in skipped[1] and "manifest.json is missing" in skipped[1]


def test_what_resume_from_checkpoint_may_be(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    checkpoint, elsewhere = write_checkpoint(run, 4), write_checkpoint(other, 2)
    for requested in (True, "true", "latest", "auto", str(run), str(checkpoint)):
        assert find(requested, run)[0] == checkpoint, requested
    assert find(str(other), run)[0] == elsewhere
    assert find("auto", tmp_path / "new")[0] is None
    for requested in ("latest", str(tmp_path / "new")):
        with pytest.raises(FileNotFoundError, match="no complete checkpoint in"):
            find(requested, tmp_path / "new")


def test_going_back_keeps_what_is_written_then(tmp_path, processor, clouds):
    """The intervals of the resumed run count, and rotation deletes nothing of the way that was left."""
    every_third = EVERY_STEP | {"save_steps": 3}
    make_trainer(tmp_path, processor, clouds, max_steps=9, save_total_limit=3, **every_third).train()
    again = make_trainer(tmp_path, processor, clouds, max_steps=9, save_total_limit=2, **EVERY_STEP)
    again.add_callback(StopAfter(5))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-4", "checkpoint-5", "checkpoint-6", "checkpoint-9"]
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-5"


def test_a_finished_run_that_is_resumed_takes_no_further_step(tmp_path, processor, clouds):
    make_trainer(tmp_path, processor, clouds, max_steps=3, **EVERY_STEP).train()  # of the 4 steps of an epoch
    again = make_trainer(tmp_path, processor, clouds, max_steps=3, **EVERY_STEP)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    state = storage.load_tensors(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(again.model.state_dict()[name], value) for name, value in state.items())


# -- of which run ------------------------------------------------------------------------------------------------------

RUN = {
    "model": {"llm": "/models/a", "lora_alpha": 32, "attention": "sdpa"},
    "data": {"up_axis": "y", "packing": False},
    "training": {"learning_rate": 1e-4, "save_steps": 5},
    "language_model": "abc",
    "processes": 1,
}


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "lora_alpha", 16),
        ("data", "up_axis", "z"),
        ("data", "packing", True),
        ("training", "learning_rate", 1e-6),
        ("training", "optim", "adamw_8bit"),
        ("training", "weight_decay", 0.1),
        ("training", "lr_scheduler_type", "linear"),
        ("data", "an_option_of_tomorrow", 1),
    ],
)
def test_a_changed_option_of_the_course_is_refused(section, name, value, tmp_path):
    changed = RUN | {section: RUN[section] | {name: value}}
    with pytest.raises(CheckpointError, match=rf"{section}\.{name} was .*, is {value}"):
        differences(RUN, changed, tmp_path)


@pytest.mark.parametrize("name", ["language_model", "processes", "samples_per_step"])
def test_another_language_model_or_number_of_processes_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match=name):
        differences(RUN, RUN | {name: "other"}, tmp_path)


def test_what_may_change_takes_effect_and_is_reported(tmp_path):
    moved = {
        "model": RUN["model"] | {"llm": "/moved/a", "attention": "eager"},
        "training": {"learning_rate": 1e-4, "save_steps": 9, "output_dir": "elsewhere"},
    }
    assert differences(RUN, RUN, tmp_path) == []
    assert differences(RUN, RUN | moved, tmp_path) == [
        "model.attention was sdpa, is eager",
        "model.llm was /models/a, is /moved/a",
        "training.save_steps was 5, is 9",
    ]


# -- optimizers, random numbers, scaler --------------------------------------------------------------------------------


def optimizers():
    import bitsandbytes
    from transformers.optimization import Adafactor

    factored = {"lr": 0.1, "relative_step": False, "scale_parameter": False}
    return {
        "adamw_8bit": (torch.float32, lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.1)),
        "paged_adamw_8bit": (torch.float32, lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=0.1)),
        "lion_8bit": (torch.float32, lambda p: bitsandbytes.optim.Lion8bit(p, lr=0.1)),
        "adafactor": (torch.float32, lambda p: Adafactor(p, **factored)),
        "adafactor of bf16 parameters": (torch.bfloat16, lambda p: Adafactor(p, **factored)),
        "adamw_8bit of bf16 parameters": (torch.bfloat16, lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.1)),
    }


@pytest.mark.parametrize("name", list(optimizers()))
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_an_optimizer_goes_on_to_the_bit(name, tmp_path):
    """Two matrices, of which the larger has 8-bit states; after 3 of 5 steps the second half is run twice."""
    dtype, make = optimizers()[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [(80, 64), (3, 4)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]

    def begin(values):
        parameters = [torch.nn.Parameter(value.to(dtype)) for value in values]
        optimizer = make(parameters)
        return parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def advance(parameters, optimizer, scheduler, steps):
        for step in steps:
            for parameter, gradient in zip(parameters, gradients[step], strict=True):
                parameter.grad = gradient.to(dtype)
            optimizer.step()
            scheduler.step()

    first = begin(start)
    advance(*first, range(3))
    run_checkpoints.save_optimizer(tmp_path, *first[1:])
    second = begin([parameter.detach().clone() for parameter in first[0]])
    run_checkpoints.load_optimizer(tmp_path, *second[1:])
    for state, again in zip(first[1].state.values(), second[1].state.values(), strict=True):
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        assert tensors and all(again[key].dtype == value.dtype for key, value in tensors.items())
        assert all(torch.equal(again[key], value) for key, value in tensors.items())
    advance(*first, range(3, 5))
    advance(*second, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[2].get_last_lr() == second[2].get_last_lr()


@pytest.mark.parametrize("name", ["optimizer.json", "optimizer.safetensors", "random_0.json", "random_0.safetensors"])
@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff" * 300, b'{"state": {"0": {"tensor": "x"}}, "python": [1]}'])
def test_a_file_of_the_state_that_does_not_fit_is_named(name, content, tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    run_checkpoints.save_optimizer(tmp_path, optimizer, scheduler)
    run_checkpoints.save_random(tmp_path / "random_0")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        run_checkpoints.load_optimizer(tmp_path, optimizer, scheduler)
        run_checkpoints.load_random(tmp_path / "random_0")


def test_the_scaler_of_fp16_is_json(tmp_path, processor, clouds):
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 2.0)]
    trainer = make_trainer(tmp_path, processor, clouds)
    trainer.accelerator.scaler = scalers[0]
    trainer._save_scaler(str(tmp_path))
    assert json.loads((tmp_path / "scaler.json").read_text())["scale"] == 8.0
    trainer.accelerator.scaler = scalers[1]
    trainer._load_scaler(str(tmp_path))
    assert scalers[1].state_dict() == scalers[0].state_dict()
