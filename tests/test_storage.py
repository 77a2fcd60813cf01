"""Files are complete or absent, load completely or not at all; locks, hashes and the origin of a result."""

import hashlib
import json
import os
import random
import subprocess

import numpy as np
import pytest
import torch
from made_processes import in_processes
from safetensors.torch import load_file, save_file
from torch import nn

from pointalign import run_checkpoints, storage


def hidden_files(folder) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name.startswith(".")]


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    target = tmp_path / "deep" / "value.json"
    storage.write_json(target, {"a": 1})
    with pytest.raises(OSError, match="disk is full"), storage.replacing(target) as temporary:
        temporary.write_text("half")
        raise OSError("disk is full")
    assert json.loads(target.read_text()) == {"a": 1} and hidden_files(target.parent) == []
    with pytest.raises(KeyboardInterrupt), storage.replacing(tmp_path / "new") as temporary:
        temporary.mkdir()
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists() and hidden_files(tmp_path) == []


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    for name in ("old", "new"):
        with storage.replacing(target) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [one.name for one in target.iterdir()] == ["new"] and hidden_files(tmp_path) == []


def test_leftovers_of_a_killed_run_do_not_mix_in(tmp_path):
    (tmp_path / ".model.incomplete").mkdir()
    (tmp_path / ".model.incomplete" / "stale").touch()
    with storage.replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
    assert list((tmp_path / "model").iterdir()) == []


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_training_state_is_what_training_changes():
    model = network()
    model[0].requires_grad_(False)
    names = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias"}
    assert set(storage.training_state(model)) == names
    model[1].requires_grad_(False)
    assert set(storage.training_state(model)) == {"2.weight", "2.bias"}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    model, other = network(0), network(1)
    model(torch.randn(5, 3))
    storage.write_tensors(tmp_path / "model.safetensors", storage.training_state(model))
    storage.load_state(other, tmp_path / "model.safetensors", set(model.state_dict()))
    assert all(torch.equal(other.state_dict()[name], one) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("2.bias"), "missing 2.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"0.weight": torch.zeros(4, 2)}), r"0.weight has shape \[4, 2\], the model's is \[4, 3\]"),
    ],
)
def test_nothing_is_loaded_in_part(spoil, message, tmp_path):
    model = network()
    state = {name: one + 1 for name, one in model.state_dict().items()}
    spoil(state)
    save_file(state, tmp_path / "bad.safetensors")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        storage.load_state(model, tmp_path / "bad.safetensors", set(before))
    assert all(torch.equal(model.state_dict()[name], one) for name, one in before.items())


def test_a_missing_or_truncated_file_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        storage.load_state(network(), path, set())
    save_file(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"state.safetensors is not a complete safetensors file"):
        storage.load_state(network(), path, set(network().state_dict()))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_where_it_stopped(kind, tmp_path):
    inputs = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))

    def start():
        model = network()
        optimizer = kind([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(model, optimizer, scheduler, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        scheduler.step()

    straight = start()
    for x in inputs:
        step(*straight, x)
    first = start()
    for x in inputs[:3]:
        step(*first, x)
    run_checkpoints.save_optimizer(tmp_path, *first[1:])
    storage.write_tensors(tmp_path / "m.safetensors", first[0].state_dict())
    second = start()
    storage.load_state(second[0], tmp_path / "m.safetensors", set(first[0].state_dict()))
    run_checkpoints.load_optimizer(tmp_path, *second[1:])
    for x in inputs[3:]:
        step(*second, x)
    assert all(torch.equal(a, b) for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True))
    assert straight[2].get_last_lr() == second[2].get_last_lr()


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(),
            torch.rand(3).tolist(),
        )

    keep = random.getstate(), np.random.get_state(), torch.get_rng_state()
    draw()
    run_checkpoints.save_random(tmp_path / "random_0")
    expected = draw()
    draw()
    run_checkpoints.load_random(tmp_path / "random_0")
    assert draw() == expected
    random.setstate(keep[0])
    np.random.set_state(keep[1])
    torch.set_rng_state(keep[2])


def test_only_safetensors_and_json_are_written(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    run_checkpoints.save_optimizer(tmp_path, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    run_checkpoints.save_random(tmp_path / "random_0")
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "optimizer.json", "optimizer.safetensors", "random_0.json", "random_0.safetensors",
    ]  # fmt: skip
    assert "0.exp_avg" in load_file(tmp_path / "optimizer.safetensors")


def test_the_hash_of_files_is_that_of_their_contents_in_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * 5_000_000)  # more than one block
    second.write_bytes(b"y")
    assert storage.file_hash(first, second) == hashlib.sha256(b"x" * 5_000_000 + b"y").hexdigest()
    assert storage.file_hash(second, first) != storage.file_hash(first, second)


CPU = torch.device("cpu")
# of result files that were written earlier
FIELDS = {"device", "driver", "torch", "triton", "numpy", "python", "commit", "uncommitted_changes", "date"}


def test_the_origin_of_a_result_names_device_versions_and_commit():
    origin = storage.provenance(CPU)
    assert FIELDS <= origin.keys()
    assert (
        origin["torch"].split("+")[0] == torch.__version__.split("+")[0]
        and origin["packages"]["transformers"] == origin["transformers"]
    )
    assert origin["device"].endswith(f"threads: {torch.get_num_threads()}")
    if (storage.ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=storage.ROOT, capture_output=True, text=True).stdout
        assert head.startswith(origin["commit"]) and len(origin["commit"]) == 12


def test_without_git_and_other_programs_the_origin_says_what_it_can(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("POINTALIGN_COMMIT", "abc123")
    origin = storage.provenance(CPU)
    assert FIELDS <= origin.keys()
    assert (origin["commit"], origin["uncommitted_changes"], origin["driver"]) == ("abc123", None, None)
    assert origin["device"].startswith(storage.platform.machine())
    monkeypatch.delenv("POINTALIGN_COMMIT")
    assert storage.provenance(CPU)["commit"] is None


def test_the_commit_of_another_repository_is_not_ours(monkeypatch, tmp_path):
    """An installed package may lie in a folder, such as a virtual environment, that a repository contains."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "theirs"], cwd=tmp_path, check=True)
    monkeypatch.setattr(storage, "ROOT", tmp_path)
    monkeypatch.setattr(storage, "__file__", str(tmp_path / "storage.py"))
    monkeypatch.delenv("POINTALIGN_COMMIT", raising=False)
    assert storage.provenance(CPU)["commit"] is None


# -- locks -------------------------------------------------------------------------------------------------------------


def try_lock(path) -> None:
    with storage.lock(path, wait=False) as held:
        print(held)


def lock_in_another_process(path) -> str:
    [ended] = in_processes(path.parents[1], try_lock, path, count=1)
    assert ended.status == 0, ended
    return ended.output.splitlines()[-1]


@pytest.mark.skipif(os.name != "posix", reason="without flock there is no lock")
def test_one_process_at_a_time_holds_a_lock(tmp_path):
    path = tmp_path / "new folder" / "name.lock"
    with storage.lock(path) as held:
        assert held and lock_in_another_process(path) == "False"
    assert lock_in_another_process(path) == "True"
    with pytest.raises(KeyError), storage.lock(path):
        raise KeyError
    assert lock_in_another_process(path) == "True"
