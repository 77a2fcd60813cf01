"""FSDP with two gloo processes on a CPU: the losses and updates of one process on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from test_trainer import make_trainer

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
import conftest, test_sharded
torch.set_num_threads(1)
processor = conftest.processor.__wrapped__(conftest.tokenizer.__wrapped__())
test_sharded.train_and_keep({folder!r}, processor, conftest.clouds.__wrapped__(), 4, {out!r}, **{options!r})
"""


def train_and_keep(folder, processor, clouds, batch, out, **options):
    """Three steps over the same samples in order; keeps logs and trained weights, whole again."""
    trainer = make_trainer(
        folder,
        processor,
        clouds,
        max_steps=3,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        learning_rate=1e-3,
        **options,
    )
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    trainer.train()
    if "fsdp" in options:
        from torch.distributed.tensor import DTensor

        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        saved = Path(folder) / "checkpoint-3" / "model.safetensors"
    state = trainer.whole_state() or trainer.model.state_dict()
    if trainer.is_world_process_zero():
        if "fsdp" in options:
            for name, tensor in load_file(saved).items():
                assert torch.equal(tensor, state[name].cpu()), name
        logs = [
            [entry[name] for name in ("loss", "ntp_loss", "alignment_loss", "grad_norm")]
            for entry in trainer.state.log_history
            if "ntp_loss" in entry
        ]
        weights = {name: state[name].float() for name in trained}
        torch.save({"logs": torch.tensor(logs), **weights}, out)


def test_two_shards_make_the_updates_of_one_process(tmp_path, processor, clouds):
    alone, shards = tmp_path / "alone.pt", tmp_path / "shards.pt"
    train_and_keep(str(tmp_path / "a"), processor, clouds, 8, str(alone))
    options = {"fsdp": "full_shard auto_wrap", "save_strategy": "steps", "save_steps": 3}
    script = tmp_path / "shards.py"
    script.write_text(
        SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "b"), out=str(shards), options=options)
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29733", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(file, weights_only=True) for file in (alone, shards))
    assert one.keys() == two.keys() and len(one) > 10
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
