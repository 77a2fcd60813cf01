"""The rows of the training-step benchmark: ways to train, the batches that they read, their models and losses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from random_language_model import random_language_model
from torch import Tensor, nn

from pointalign import build
from pointalign.alignment import AlignmentConfig
from pointalign.data.collator import PackShape, fill, pack, smallest_shape
from pointalign.efficient import fused_parts, quantization
from pointalign.efficient.fused_lora import AdapterGroup
from pointalign.efficient.varlen_attention import choose_attention
from pointalign.model_options import ModelOptions
from pointalign.models import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.trainer import AlignedModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
BATCHES = (16,) * 4 if CUDA else (2,) * 2  # samples of the batches that rotate
STAGE = (6, 10, 4, 10, 4, 6, 10, 4) if CUDA else (2, 3, 1)  # the paper's, drawn 2:3:3; on a CPU each once
SHAPE, RANK = ("Phi-2", 64) if CUDA else ("small", 8)
PROMPT = 12  # tokens of the chat template around question and cloud


class Row(NamedTuple):
    """One way to train.

    Attributes:
        packed: samples end to end; else padded to the longest.
        groups: micro-batches of samples of like length.
        online: encode the clouds in every step; else Q-Former features as the cache gives them.
        full_logits: head and loss over all places, as transformers does it.
        targets: layers with adapters.
        kbit: norms, embeddings and head in fp32, as peft's prepare_model_for_kbit_training leaves them.
        stored_masks: LoRA's dropout by PyTorch, which stores its masks, where kernels could draw them.
        graphs: batches are filled up to one size, and the decoder's passes are replayed from CUDA graphs.
        note: what a row does less than the others, if it does.
    """

    name: str
    attention: str = "sdpa"
    packed: bool = False
    groups: int = 1
    checkpointing: bool = True
    online: bool = True
    full_logits: bool = True
    kbit: bool = True
    quantization: str = "nf4"
    dequantize_once: bool = False
    parts: tuple[str, ...] = ()
    alignment: str = "reference"
    targets: str | tuple[str, ...] = "all-linear"
    compiled: bool = False
    half: torch.dtype = torch.bfloat16
    stored_masks: bool = False
    graphs: bool = False
    note: str = ""


B = Row("b: transformers + peft + bitsandbytes")
B3 = B._replace(name="b3: b, packed", packed=True)
D1 = B3._replace(name="d1: b3 + varlen attention", attention="varlen")
D2 = D1._replace(name="d2: + norms, embeddings and head in bf16", kbit=False)
D3 = D2._replace(name="d3: + feature cache", online=False, note="the encoder ran once before, outside of the step")
D4 = D3._replace(name="d4: + loss over supervised rows", full_logits=False, parts=("cross_entropy",))
D5 = D4._replace(name="d5: + tanh-GELU", parts=(*D4.parts, "gelu"))
D6 = D5._replace(name="d6: + lean norms", parts=(*D5.parts, "norms"))
D7 = D6._replace(name="d7: + rotary embedding", parts=(*D6.parts, "rotary"))
D8 = D7._replace(name="d8: + lean LoRA", parts=(*D7.parts, "lora"))
D9 = D8._replace(name="d9: + merged products", parts=(*D8.parts, "merged"))
D10 = D9._replace(name="d10: + no checkpointing", checkpointing=False)
D11 = D10._replace(name="d11: + dequantised once", dequantize_once=True)
E = D11._replace(name="e: everything", parts=fused_parts.PARTS, alignment="auto")
E3 = E._replace(name="e3: e, LoRA's dropout by PyTorch", stored_masks=True)
F = E._replace(name="f: e, filled batches, CUDA graphs", graphs=True)
ROWS = [
    Row(
        "a: the release's way",
        attention="eager",
        checkpointing=False,
        kbit=False,
        quantization="none",
        half=torch.float16 if CUDA else torch.bfloat16,
    ),
    B,
    B._replace(name="b2: b, batches of like length", groups=2),
    B3,
    B3._replace(
        name="c: b3, torch.compile",
        compiled=True,
        checkpointing=False,  # a compiled layer saves other tensors when it is computed again, which PyTorch refuses
        note="no activation checkpointing",
    ),
    *[D1, D2, D3, D4, D5, D6, D7, D8, D9, D10, D11],
    E,
    E._replace(
        name="e2: e, LoRA where the paper has it",
        targets=("q_proj", "k_proj", "v_proj", "dense"),
        note="no adapters on fc1 and fc2",
    ),
    E3,
    F,
]


def described(row: Row) -> dict[str, Any]:
    return row._asdict() | {"half": str(row.half).removeprefix("torch."), "parts": list(row.parts)}


def text_config(architecture: str = "phi-2"):
    """Phi-2, on a CPU a small model of its kind (many CPUs multiply bf16 50 times slower than fp32); or `llama-8b`."""
    from transformers import LlamaConfig, PhiConfig

    if architecture == "llama-8b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
    if CUDA:
        return PhiConfig(
            vocab_size=51200,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            partial_rotary_factor=0.4,
            resid_pdrop=0.1,
        )
    return PhiConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        partial_rotary_factor=0.4,
        resid_pdrop=0.1,
    )


def whole_config(config: Any) -> Any:
    return PointAlignConfig.from_preset("minigpt3d-phi2" if CUDA else "mini", type(config)(**config.to_dict()))


def lengths(samples: int, seed: int) -> list[tuple[int, int]]:
    """Tokens of question and answer of each sample: the mix of the training data."""
    generator = torch.Generator().manual_seed(seed)
    questions = torch.randint(6, 26, (samples,), generator=generator).tolist()
    answers = torch.randint(20, 201, (samples,), generator=generator).tolist()
    return list(zip(questions, answers, strict=True))


def make_batch(config: Any, samples: int, seed: int) -> dict[str, Tensor]:
    """A padded batch: 32 point tokens, question, answer; random ids, clouds and features."""
    sizes = lengths(samples, seed)
    queries = config.num_query_tokens
    total = max(queries + PROMPT + question + answer for question, answer in sizes)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.text_config.vocab_size, (samples, total), generator=generator)
    places = torch.arange(total)[None]
    end = torch.tensor([queries + PROMPT + question + answer for question, answer in sizes])[:, None]
    start = torch.tensor([queries + PROMPT + question for question, _ in sizes])[:, None]
    clouds = torch.randn(samples, 8192 if CUDA else 1024, 6, generator=generator)
    clouds[..., :3] /= clouds[..., :3].norm(dim=2, keepdim=True).amax(dim=1, keepdim=True)
    width = config.qformer_config.hidden_size
    return {
        "input_ids": ids,
        "attention_mask": (places < end).long(),
        "labels": torch.where((places >= start) & (places < end), ids, -100),
        "point_mask": ((places >= 4) & (places < 4 + queries)).expand(samples, -1).clone(),
        "point_values": clouds,
        "query_features": torch.randn(samples, queries, width, generator=generator).half(),
    }


def shape_of(batches: Sequence[dict[str, Tensor]]) -> PackShape:
    """The smallest shape that all batches can be filled up to, each packed into a row."""
    sizes = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    return smallest_shape(sizes, max(map(sum, sizes)))


def inputs_of(row: Row, batch: dict[str, Tensor], shape: PackShape | None = None) -> list[dict[str, Any]]:
    """The micro-batches that a row reads a batch as; packed ones are filled up to a shape."""
    unread = "query_features" if row.online else "point_values"
    batch = {name: tensor for name, tensor in batch.items() if name != unread}
    order = batch["attention_mask"].sum(1).argsort()
    micro_batches = []
    for part in order.chunk(row.groups):
        longest = int(batch["attention_mask"][part].sum(1).max())
        taken = {
            name: tensor[part][:, :longest]
            if name in ("input_ids", "attention_mask", "labels", "point_mask")
            else tensor[part]
            for name, tensor in batch.items()
        }
        read = pack(taken) if row.packed else taken
        micro_batches.append(read if shape is None else fill(read, shape))
    return [{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in inputs.items()} for inputs in micro_batches]


def build_row(row: Row, config: Any, rank: int) -> AlignedModel:
    text = random_language_model(config, row.quantization, torch.bfloat16, DEVICE)
    if row.dequantize_once:
        quantization.dequantize(text)
    torch.manual_seed(0)
    model = PointAlignForConditionalGeneration.from_language_model(text, "minigpt3d-phi2" if CUDA else "mini")
    targets = row.targets if isinstance(row.targets, str) else list(row.targets)
    options = ModelOptions(lora_rank=rank, lora_alpha=16, lora_dropout=0.05, lora_targets=targets)
    build.add_adapters(model, options)
    build.set_trainable(model, ["lora"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # both halves, or half of the gradients would be zero
            parameter.data = parameter.data.float()
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    language_model = model.model.language_model
    if row.kbit:
        for parameter in language_model.parameters():
            if parameter.dtype == torch.bfloat16 and not (row.dequantize_once and parameter.ndim == 2):
                parameter.data = parameter.data.float()
    aligned = AlignedModel(model, AlignmentConfig(weight=0.1), row.alignment).to(DEVICE)
    packed_attention = "auto" if row.attention == "sdpa" and row.packed and CUDA else row.attention
    if packed_attention == "auto":  # what transformers itself offers for packed batches
        chosen = choose_attention("auto", True, DEVICE.type)
        packed_attention = chosen if chosen == "flash_attention_2" else "sdpa"
    language_model.set_attn_implementation(packed_attention)
    if row.checkpointing:
        aligned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return aligned.train()


def full_logits(model: Any) -> Callable[..., Tensor]:
    """The loss as transformers computes it, over the logits of all places."""

    def loss(inputs_embeds, attention_mask, labels, num_items_in_batch=None, **kwargs):
        return model.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        ).loss

    return loss


@contextmanager
def prepared(row: Row, config: Any, rank: int) -> Iterator[tuple[AlignedModel, Callable[..., Tensor]]]:
    """A row's model, and `loss(batch, shape=None)` that leaves gradients; a shape fills the batch up.

    CUDA graphs are left to the caller: dropout is a part of what they record.

    What is put in place of its methods refers to the model itself and is taken out at the end: such a cycle would keep
    a finished row's model in memory while the next row is measured.
    """
    aligned = build_row(row, config, rank)
    with ExitStack() as stack:

        def replace(module: nn.Module, name: str, function: Callable) -> None:
            vars(module)[name] = function
            stack.callback(vars(module).pop, name)

        if row.full_logits:
            replace(aligned.model, "_supervised_loss", full_logits(aligned.model))
        stack.enter_context(fused_parts.applied(aligned.model, row.parts))
        if row.stored_masks:
            stack.enter_context(patch.object(AdapterGroup, "draws_from_counter", lambda group, rows: False))
        if row.compiled:
            # Block by block: the tap's hooks stay outside. On a CPU, where the row only shows that it runs, no code is
            # generated: that takes minutes.
            backend = "inductor" if CUDA else "aot_eager"
            for layer in aligned.model.get_decoder().layers:
                replace(layer, "forward", torch.compile(layer.forward, dynamic=True, backend=backend))

        def loss(batch: dict[str, Tensor], shape: PackShape | None = None) -> Tensor:
            tokens = (batch["labels"] != -100).sum().to(DEVICE)
            rows = batch["point_mask"].sum().to(DEVICE)
            total = torch.zeros((), device=DEVICE)
            for inputs in inputs_of(row, batch, shape):
                with torch.autocast(DEVICE.type, row.half):
                    part = aligned._losses(
                        inputs.pop("point_mask"),
                        rows,
                        inputs | {"num_items_in_batch": tokens, "use_cache": False},
                    )["loss"]
                part.backward()
                total += part.detach()
            return total

        yield aligned, loss


@contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    drops = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in drops:
        module.p = 0.0
    try:
        yield
    finally:
        for module, share in drops:
            module.p = share
