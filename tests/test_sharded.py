"""FSDP with two gloo processes on a CPU: the losses and updates of one process on the same global batch.

accelerate offers FSDP on GPUs only, so `fully_shard` is applied here as accelerate applies it there: to every decoder
block, then to the model. The sharded run packs its samples and runs the fused parts, the single one does neither.
"""

from contextlib import nullcontext

import pytest
import torch
from conftest import byte_tokenizer, make_processor, read_clouds
from made_processes import in_processes
from test_trainer import Samples, make_model

from pointalign import train
from pointalign.data.collator import ConversationCollator
from pointalign.efficient import fused_parts
from pointalign.efficient.varlen_attention import choose_attention


def train_and_keep(processor, clouds, out, sharded=False):
    """Three updates on eight samples; keeps losses and trained weights, whole again."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank, world = (torch.distributed.get_rank(), 2) if sharded else (0, 1)
    samples = Samples([cloud[:256] for cloud in clouds])
    whole = ConversationCollator(processor, 512)([samples[index] for index in range(8)])
    tokens, rows = (whole["labels"] != -100).sum(), whole["point_mask"].sum()
    collator = ConversationCollator(processor, 512, packing=sharded)
    batch = collator([samples[index] for index in range(rank, 8, world)])

    aligned = make_model().train()
    trained = [name for name, p in aligned.named_parameters() if p.requires_grad]
    decoder = aligned.model.get_decoder()
    parts = [part for part in fused_parts.PARTS if part != "merged"]
    with fused_parts.applied(aligned.model, parts) if sharded else nullcontext():
        if sharded:
            aligned.model.model.language_model.set_attn_implementation(choose_attention("varlen", True, "cpu"))
            for layer in decoder.layers:
                fully_shard(layer)
            fully_shard(aligned)
            assert all(isinstance(p, DTensor) for p in aligned.parameters())
            assert decoder.layers[0].mlp.up_proj.base_layer.weight.to_local().shape[0] == 32  # of 64 rows
        optimizer = torch.optim.AdamW([p for p in aligned.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            found = aligned(**batch, num_items_in_batch=tokens, num_point_rows=rows)
            (found["loss"] * world).backward()  # gradients are averaged over processes
            optimizer.step()
            optimizer.zero_grad()
            logged = torch.stack([found[name].detach() for name in ("loss", "ntp_loss", "alignment_loss")])
            if sharded:
                torch.distributed.all_reduce(logged)
            losses.append(logged)
    state = get_model_state_dict(aligned, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save({"losses": torch.stack(losses)} | {name: state[name] for name in trained}, out)


def train_a_shard(out: str) -> None:
    torch.distributed.init_process_group("gloo")
    train_and_keep(make_processor(byte_tokenizer()), read_clouds(), out, sharded=True)
    torch.distributed.destroy_process_group()


def test_two_shards_make_the_updates_of_one_process(tmp_path, processor, clouds):
    alone, shards = tmp_path / "alone.pt", tmp_path / "shards.pt"
    train_and_keep(processor, clouds, str(alone))
    ended = in_processes(tmp_path, train_a_shard, str(shards), ACCELERATE_USE_FSDP="true")
    assert [process.status for process in ended] == [0, 0], ended
    one, two = (torch.load(file, weights_only=True) for file in (alone, shards))
    assert one.keys() == two.keys() and len(one) > 10
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_fsdp_without_a_gpu_is_refused(tmp_path, capsys):
    arguments = ["demo", "--training.fsdp", "full_shard", "--training.use_cpu", "true"]
    with pytest.raises(SystemExit):
        train.main([*arguments, "--training.output_dir", str(tmp_path)])
    assert "shards on GPUs only" in capsys.readouterr().err
