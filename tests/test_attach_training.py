"""`pointalign.attach` under what trains models: Trainer, LoRA, 4 bits, checkpointing, torch.compile, two processes."""

import os
import runpy
import socket
from pathlib import Path

import pytest
import torch
from made_multimodal import make
from torch import nn
from torch.utils.data import Dataset, default_collate
from transformers import Trainer, TrainingArguments

import pointalign
from pointalign.attachment import NAME

LONG = pytest.mark.skipif(
    "POINTALIGN_LONG_TESTS" not in os.environ, reason="compiles or starts processes: run it by `make test-long`"
)


class Samples(Dataset):
    """Eight samples with equally many supervised tokens, as a step is split by them."""

    def __init__(self, name):
        _, batch, places = make(name)
        generator = torch.Generator().manual_seed(4)
        random = torch.randint(3, 100, (8, places.shape[1]), generator=generator)
        ids = torch.where(places[:1], batch["input_ids"][:1], random)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 6, -100)
        pixels = torch.randn(8, *batch["pixel_values"].shape[1:], generator=generator)
        self.rows = [
            {"input_ids": row, "labels": label, "attention_mask": torch.ones_like(row), "pixel_values": image}
            for row, label, image in zip(ids, labels, pixels, strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def train(folder, checkpoint=None, seed=0, name="LLaVA", **options):
    model, _, _ = make(name)
    handle = pointalign.attach(model, layers=2, weight=0.5, seed=seed)
    arguments = TrainingArguments(
        str(folder), max_steps=4, learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Samples(name), callbacks=[handle.callback()])
    trainer.train(resume_from_checkpoint=checkpoint)
    return model, handle, trainer.state.log_history


def test_the_trainer_trains_logs_and_splits_a_batch_without_changing_it(tmp_path):
    at_once = train(tmp_path / "a", save_strategy="no", per_device_train_batch_size=4)
    split = train(tmp_path / "b", save_strategy="no", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    losses = [[entry["alignment_loss"] for entry in run[2] if "alignment_loss" in entry] for run in (at_once, split)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0][-1] < losses[0][0] - 0.02
    total = [entry["loss"] for entry in at_once[2] if "loss" in entry]
    assert total == pytest.approx([entry["loss"] for entry in split[2] if "loss" in entry], abs=2e-3)


def test_the_trainer_resumes_exactly(tmp_path):
    saving = {"per_device_train_batch_size": 2, "save_steps": 2, "name": "SmolVLM"}
    model, _, _ = train(tmp_path, **saving)
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "alignment.safetensors").exists()
    resumed, _, _ = train(tmp_path, str(checkpoint), seed=9, **saving)
    for (name, value), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name
    (checkpoint / "alignment.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"alignment\.safetensors"):
        train(tmp_path, str(checkpoint), **saving)


def test_trl(tmp_path, tokenizer):
    trl = pytest.importorskip("trl", reason="SFTTrainer needs trl")
    datasets = pytest.importorskip("datasets", reason="trl needs datasets")
    samples = Samples("LLaVA")
    losses = {}
    for name, batch_size in (("at once", 4), ("split", 1)):
        model, _, _ = make("LLaVA")
        arguments = trl.SFTConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=batch_size, learning_rate=1e-2, logging_steps=1,
            gradient_accumulation_steps=4 // batch_size, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            save_strategy="no", lr_scheduler_type="constant", dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False, max_length=None, gradient_checkpointing=False,
        )  # fmt: skip
        early = pointalign.attach(model)
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list([{"index": i, "labels": [1]} for i in range(8)]),
            data_collator=lambda rows: default_collate([samples[row["index"]] for row in rows]),
            processing_class=tokenizer,
        )  # fmt: skip
        with pytest.raises(ValueError, match="build it first"):
            early.join(trainer)
        with pytest.raises(RuntimeError, match="not through `forward` of the model"):
            trainer.train()
        early.detach()
        handle = pointalign.attach(trainer.model, layers=2, weight=0.5)
        handle.join(trainer)
        trainer.train()
        losses[name] = [entry["alignment_loss"] for entry in trainer.state.log_history if "alignment_loss" in entry]
    assert len(losses["split"]) == 3 and losses["split"][-1] < losses["split"][0] - 0.01
    assert losses["split"] == pytest.approx(losses["at once"], abs=5e-4)


def test_a_replaced_forward_is_an_error_and_no_silent_loss():
    model, batch, _ = make("LLaVA")
    handle = pointalign.attach(model)
    inner = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(RuntimeError, match="not through `forward` of the model"):
        model.model(**inner)
    model.eval()
    model.model(**inner)
    model.train()
    model(**batch)
    assert handle.losses


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)"))


def test_lora(tmp_path):
    model, batch, _ = make("LLaVA")
    adapted = lora(model)
    handle = pointalign.attach(adapted, layers=2)
    outputs = adapted(**batch)
    assert outputs.alignment_loss.requires_grad
    outputs.alignment_loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert all("lora_" in name or NAME in name for name in trained)
    assert any("layers.0." in name for name in trained) and not any("layers.2." in name for name in trained)
    adapted.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    handle.detach()
    merged = adapted.merge_and_unload()
    assert not any(NAME in name for name, _ in merged.named_modules()) and "forward" not in vars(merged)


def test_adapters_that_are_put_on_afterwards_are_an_error():
    model, batch, _ = make("LLaVA")
    pointalign.attach(model)
    with pytest.raises(ValueError, match="attach after them"):
        lora(model)(**batch)


def test_checkpointing_changes_nothing():
    model, batch, _ = make("LLaVA")
    pointalign.attach(model, layers=2)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = gradients()
    assert given.keys() == expected.keys() and all(torch.equal(given[name], expected[name]) for name in expected)


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    plain, batch, _ = make("LLaVA")
    plain.save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    loaded = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=four_bits, dtype=torch.bfloat16
    )
    model = lora(loaded)
    handle = pointalign.attach(model.train(), layers=2)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    model(**batch).loss.backward()
    assert 0 < float(handle.losses["alignment_loss"]) < 2 and handle.target.width == 24
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in handle.parameters())


@LONG
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_torch_compile(backend):
    model, batch, _ = make("LLaVA")
    handle = pointalign.attach(model, layers=[1, 2])
    compiled = torch.compile(model, backend=backend)
    longer = {name: torch.cat([value, value]) for name, value in batch.items()}
    for inputs in (batch, batch, longer):
        results = []
        for each in (model, compiled):
            model.zero_grad()
            each(**inputs).loss.backward()
            norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
            results.append([handle.losses["alignment_loss"], *norms])
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def _rank(rank: int, port: int, folder: str) -> None:
    """Half of a batch in each of two processes; then again, and the second process has text alone."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, batch, _ = make("LLaVA")
    handle = pointalign.attach(model, layers=2, weight=0.5)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    half = {name: value[rank : rank + 1] for name, value in batch.items()}
    parallel(**half).loss.backward()
    state = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    if rank == 1:
        half = {"input_ids": half["input_ids"].clamp(max=100), "labels": half["labels"]}
    parallel(**half).loss.backward()  # a rank without images still takes part
    handle.detach()
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@LONG
def test_two_processes_make_the_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    model, batch, _ = make("LLaVA")
    pointalign.attach(model, layers=2, weight=0.5)
    for row in (0, 1):
        (model(**{name: value[row : row + 1] for name, value in batch.items()}).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ranks[0][name], parameter.grad, rtol=1e-5, atol=1e-7)
            assert torch.equal(ranks[0][name], ranks[1][name])
    assert any(NAME in name for name in ranks[0])


def test_the_example_trains():
    example = Path(__file__).parents[1] / "examples/attach_llava.py"
    losses = runpy.run_path(str(example))["main"]()
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.05
