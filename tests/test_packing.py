"""Packed samples: nothing lost, nothing shared, the same losses and gradients as one by one."""

import pytest
import torch
from conftest import assistant, tiny_model, user

from pointalign.alignment import AlignmentConfig
from pointalign.data.collator import IGNORED, PackShape, TokenBudgetSampler, fill, pack, token_counts
from pointalign.efficient.varlen_attention import choose_attention
from pointalign.trainer import AlignedModel


def collate(processor, conversations):
    return dict(
        processor.apply_chat_template(
            conversations, tokenize=True, return_labels=True, truncation=True, max_length=400, padding=True
        )
    )


@pytest.fixture(scope="module")
def conversations(clouds):
    """One cloud, two clouds, several turns, none at all; unequal lengths."""
    small = [cloud[:40] for cloud in clouds]
    return [
        [user("What is it?", small[0]), assistant("A bench.")],
        [user("Which is taller, the first or the second?", small[1], small[2]), assistant("The first.")],
        [user("Name it.", small[3]), assistant("A lamp."), user("Colour?"), assistant("Red, with a black foot.")],
        [user("Hello"), assistant("Hi")],
    ]


def gradients(aligned, batches, tokens, rows):
    aligned.zero_grad()
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        losses = aligned(**batch, num_point_rows=rows, num_items_in_batch=tokens)
        losses["loss"].backward()
        totals += torch.stack([losses[name].detach().double() for name in ("loss", "ntp_loss", "alignment_loss")])
    return totals, {name: p.grad.clone() for name, p in aligned.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "phi", "qwen3"])
def test_packed_equals_one_by_one(processor, conversations, architecture, attention):
    if attention == "eager" and architecture != "llama":
        pytest.skip("eager attention packs by transformers' own masks: one architecture is enough")
    aligned = AlignedModel(tiny_model(architecture), AlignmentConfig(weight=0.5, layer=[2]))
    for part in ("point_encoder", "point_mlp", "qformer"):  # frozen, as in the alignment stage
        getattr(aligned.model.model, part).requires_grad_(False)
    aligned.train()
    language_model = aligned.model.model.language_model
    batch = collate(processor, conversations)
    tokens, rows = (batch["labels"] != IGNORED).sum(), batch["point_mask"].sum()
    single = [collate(processor, [one]) for one in conversations]
    language_model.set_attn_implementation("sdpa")
    expected, expected_gradients = gradients(aligned, single, tokens, rows)

    language_model.set_attn_implementation(attention)
    packed = pack(batch)
    assert packed["input_ids"].shape == (1, sum(one["input_ids"].shape[1] for one in single))
    actual, actual_gradients = gradients(aligned, [packed], tokens, rows)

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        difference = (actual_gradients[name] - expected_gradient).norm() / expected_gradient.norm().clamp_min(1e-9)
        assert difference < 1e-4 or (actual_gradients[name] - expected_gradient).abs().max() < 1e-7, name


FILLINGS = {"pieces": (301, 3), "one": (20, 1), "none": (0, 0)}  # tokens, and segments, as many as needed


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "phi", "qwen3"])
def test_filled_equals_packed(processor, conversations, architecture, attention, filling):
    aligned = AlignedModel(tiny_model(architecture), AlignmentConfig(weight=0.5, layer=[2])).double()
    for part in ("point_encoder", "point_mlp", "qformer"):
        getattr(aligned.model.model, part).requires_grad_(False)
    aligned.train()
    aligned.model.model.language_model.set_attn_implementation(attention)
    packed = pack(collate(processor, conversations))
    tokens, rows = (packed["labels"] != IGNORED).sum(), packed["point_mask"].sum()
    expected, expected_gradients = gradients(aligned, [packed], tokens, rows)

    more, segments = FILLINGS[filling]
    total = packed["input_ids"].shape[1]
    shape = PackShape(total + more, len(conversations) + segments + 2, 120)  # two segments stay empty
    filled = fill(packed, shape)
    assert filled["input_ids"].shape == filled["labels"].shape == filled["point_mask"].shape == (1, shape.tokens)
    lengths = filled["cu_seq_lens_q"].diff().tolist()
    assert len(lengths) == shape.segments and sum(lengths) == shape.tokens and lengths[-2:] == [0, 0]
    assert max(lengths) <= filled["max_length_q"] == filled["max_length_k"] == shape.longest
    starts = [sum(lengths[:place]) for place, length in enumerate(lengths) if length]
    assert (filled["position_ids"][0] == 0).nonzero().flatten().tolist() == starts
    actual, actual_gradients = gradients(aligned, [filled], tokens, rows)

    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("shape", [PackShape(100, 9, 120), PackShape(9999, 9, 120), PackShape(500, 3, 120)])
def test_a_batch_that_does_not_fit_the_shape_is_refused(processor, conversations, shape):
    """Too few tokens, too few segments for the filling, too few for the samples."""
    packed = pack(collate(processor, conversations))
    assert 100 < packed["input_ids"].shape[1] < 500 and packed["max_length_q"] <= 120
    with pytest.raises(ValueError, match="take the shape from the sampler"):
        fill(packed, shape)
    with pytest.raises(ValueError, match=r"at most \d+ a sample"):
        fill(packed, PackShape(500, 99, packed["max_length_q"] - 1))


def test_every_batch_of_a_sampler_fits_its_shape():
    lengths = torch.randint(30, 200, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = TokenBudgetSampler(lengths, 900)
    shape, segments = sampler.shape, set()
    for batch in sampler.batches:
        sizes = torch.tensor([lengths[sample] for sample in batch])
        row = torch.arange(max(sizes))[None] < sizes[:, None]
        names = ("input_ids", "labels", "point_mask", "attention_mask")
        filled = fill(pack({name: row.long() for name in names}), shape)
        assert filled["input_ids"].shape == (1, 900) and len(filled["cu_seq_lens_q"]) == shape.segments + 1
        segments.add(int((filled["cu_seq_lens_q"].diff() > 0).sum()))
    assert max(segments) == shape.segments  # none is always empty


def test_packing_with_an_attention_mask_would_leak(processor, conversations):
    """The guard that the test above depends on: seeing the neighbours does change the losses."""
    aligned = AlignedModel(tiny_model(), AlignmentConfig(weight=0.0)).eval()
    packed = pack(collate(processor, conversations))
    apart = aligned(**packed)["loss"]
    together = aligned(**{name: one for name, one in packed.items() if name != "position_ids"})["loss"]
    assert abs(apart - together) > 1e-4


def test_pack_keeps_every_token_and_label(processor, conversations):
    batch = collate(processor, conversations)
    real = batch["attention_mask"].bool()
    packed = pack(batch)
    assert packed["input_ids"][0].tolist() == batch["input_ids"][real].tolist()
    assert (packed["labels"] != IGNORED).sum() == (batch["labels"] != IGNORED).sum()
    assert int(packed["point_mask"].sum()) == 4 * len(batch["point_values"])
    assert packed["cu_seq_lens_q"].tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    starts = packed["cu_seq_lens_q"][:-1].long()
    assert (packed["position_ids"][0, starts] == 0).all() and (packed["labels"][0, starts] == IGNORED).all()
    assert int(packed["position_ids"].max()) + 1 == packed["max_length_q"]


def test_varlen_refuses_padded_batches(processor, conversations):
    model = tiny_model()
    model.model.language_model.set_attn_implementation("varlen")
    with pytest.raises(ValueError, match="packed batches only"):
        model(**collate(processor, conversations))


def test_choose_attention(monkeypatch):
    from pointalign.efficient import varlen_attention

    assert choose_attention("auto", True, "cpu") == "varlen"
    assert choose_attention("auto", False, "cpu") == "sdpa"
    with pytest.raises(ValueError, match=r"pointalign\[flash-attn\]"):
        choose_attention("flash_attention_2", True, "cpu")
    with pytest.raises(ValueError, match="packed"):
        choose_attention("varlen", False, "cuda")
    with pytest.raises(ValueError, match="expected one of"):
        choose_attention("flash", True, "cuda")
    monkeypatch.setattr(varlen_attention, "is_flash_attn_2_available", lambda: False)
    assert choose_attention("auto", True, "cuda") == "varlen"
    monkeypatch.setattr(varlen_attention, "is_flash_attn_2_available", lambda: True)
    assert choose_attention("auto", True, "cuda") == "flash_attention_2"
    assert choose_attention("flash_attention_2", True, "cuda") == "flash_attention_2"


def test_flash_attention_gets_the_sample_borders(processor, conversations, monkeypatch):
    """transformers' own flash_attention_2 takes the same arguments: checked with its kernel replaced by ours."""
    from transformers import AttentionInterface

    from pointalign.efficient.varlen_attention import varlen_attention

    seen = {}

    def kernel(module, query, key, value, attention_mask, **kwargs):
        seen.update(kwargs)
        return varlen_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", kernel)
    model = tiny_model()
    packed = pack(collate(processor, conversations))
    expected = model(**packed, use_cache=False).loss
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(**packed, use_cache=False).loss, expected)
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} <= seen.keys()


@pytest.mark.parametrize("grouped", [True, False])
def test_cuda_kernel_call(monkeypatch, grouped):
    """The arguments handed to PyTorch's kernel, which runs on CUDA alone; before 2.12 it had no `enable_gqa`."""
    import torch.nn.attention.varlen as varlen

    from pointalign.efficient.varlen_attention import varlen_attention

    class OnCuda(torch.Tensor):
        is_cuda = True

    called = {}

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        called.update(shapes=[tuple(one.shape) for one in (query, key, value)], scale=scale, window_size=window_size)
        return torch.zeros(query.shape)

    def new(*tensors, scale, window_size, enable_gqa):
        called.update(enable_gqa=enable_gqa)
        return old(*tensors, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", new if grouped else old)
    query = torch.zeros(1, 4, 6, 8, dtype=torch.bfloat16).as_subclass(OnCuda)
    key = torch.zeros(1, 2, 6, 8, dtype=torch.bfloat16)
    borders = torch.tensor([0, 2, 6], dtype=torch.int32)
    output, _ = varlen_attention(
        torch.nn.Identity(), query, key, key, None, scaling=0.5, cu_seq_lens_q=borders, max_length_q=4
    )
    heads = 2 if grouped else 4
    assert output.shape == (1, 6, 4, 8)
    assert called["shapes"] == [(6, 4, 8), (6, heads, 8), (6, heads, 8)]
    assert called["window_size"] == (-1, 0) and called["scale"] == 0.5 and called.get("enable_gqa", False) == grouped
    with pytest.raises(ValueError, match="no dropout"):
        varlen_attention(torch.nn.Identity(), query, key, key, None, dropout=0.1, cu_seq_lens_q=borders, max_length_q=4)
    with pytest.raises(ValueError, match="sliding window"):
        varlen_attention(
            torch.nn.Identity(), query, key, key, None, sliding_window=3, cu_seq_lens_q=borders, max_length_q=4
        )


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on CUDA, through every operation."""

    is_cuda = True


def varlen_call(monkeypatch, dtypes, autocast, size=8):
    """Dtypes that the kernel was called with, none if it was not, and the dtype of the output."""
    import torch.nn.attention.varlen as varlen

    from pointalign.efficient.varlen_attention import varlen_attention

    seen = []

    def kernel(query, key, value, *borders, **options):
        seen.extend(tensor.dtype for tensor in (query, key, value))
        return torch.zeros_like(query)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: autocast)
    query, key, value = (torch.randn(1, 4, 6, size, dtype=dtype).as_subclass(CudaTensor) for dtype in dtypes)
    borders = torch.tensor([0, 2, 6], dtype=torch.int32)
    output, _ = varlen_attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.5, cu_seq_lens_q=borders, max_length_q=4
    )
    assert output.shape == (1, 6, 4, size)
    return seen, output.dtype


def test_varlen_casts_under_autocast_to_take_the_cuda_kernel(monkeypatch, caplog):
    """Rotary embeddings leave query and key in fp32 where the norms are; the kernel reads 16 bits alone."""
    fp32, bf16 = torch.float32, torch.bfloat16
    assert varlen_call(monkeypatch, (fp32, fp32, bf16), autocast=bf16) == ([bf16] * 3, bf16)
    assert varlen_call(monkeypatch, (bf16, bf16, bf16), autocast=None) == ([bf16] * 3, bf16)
    assert not caplog.records


@pytest.mark.parametrize(
    ("dtype", "size", "reason"),
    [(torch.float32, 8, "needs float16 or bfloat16, got float32"), (torch.bfloat16, 12, "a multiple of 8, got 12")],
)
def test_varlen_says_once_why_it_is_slow(monkeypatch, caplog, dtype, size, reason):
    from pointalign.efficient import varlen_attention as attention

    attention.log_once.cache_clear()
    for _ in range(2):
        assert varlen_call(monkeypatch, (dtype,) * 3, autocast=None, size=size) == ([], dtype)
    (logged,) = [record.getMessage() for record in caplog.records]
    assert logged.startswith("varlen attention runs sample by sample") and reason in logged and "\n" not in logged


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)])
def test_varlen_under_autocast_equals_sdpa_one_by_one(dtypes):
    """On a CPU too, where PyTorch's attention casts by itself."""
    from pointalign.efficient.varlen_attention import varlen_attention

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 6, 8).to(dtype) for dtype in dtypes)
    borders = torch.tensor([0, 2, 6], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = varlen_attention(
            torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=borders, max_length_q=4
        )
        pieces = [
            torch.nn.functional.scaled_dot_product_attention(
                *(tensor[:, :, start:end] for tensor in (query, key, value)), is_causal=True
            )
            for start, end in ((0, 2), (2, 6))
        ]
    assert output.dtype == torch.bfloat16 and torch.equal(output, torch.cat(pieces, dim=2).transpose(1, 2))


def test_token_budget(processor):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, 200, (500,), generator=generator).tolist()
    budget = 1600
    samplers = [TokenBudgetSampler(lengths, budget, seed=1, rank=rank, world=2) for rank in range(2)]
    batches = [list(sampler) for sampler in samplers]
    assert len(batches[0]) == len(batches[1]) == len(samplers[0])
    together = [sample for half in batches for batch in half for sample in batch]
    assert len(together) == len(set(together)) and len(together) >= 500 - budget // 40
    sizes = [sum(lengths[sample] for sample in batch) for half in batches for batch in half]
    assert max(sizes) <= budget and sum(sizes) / len(sizes) > 0.85 * budget
    samplers[0].set_epoch(1)
    assert list(samplers[0]) != batches[0]
    large = TokenBudgetSampler(lengths, 8000)  # of more samples than a window of the sorting has
    assert sorted(sample for batch in large.batches for sample in batch) == list(range(500))
    assert len(large.batches) == -(-sum(lengths) // 8000)
    with pytest.raises(ValueError, match="the budget is"):
        TokenBudgetSampler([10, 2000], budget)


def test_token_counts(processor, clouds):
    from pointalign.data.conversations import Conversation

    one = Conversation(
        ("a", "b"), "comparison", (("user", "<point><point>\nWhich is taller?"), ("assistant", "The first."))
    )
    messages = [user("Which is taller?", clouds[0], clouds[1]), assistant("The first.")]
    expected = collate(processor, [messages])["input_ids"].shape[1]
    assert token_counts(processor, [one], 400) == [expected]
    assert token_counts(processor, [one], 20) == [20]
