"""The released code's defects, numbered as in the project's facts: none of them is here."""

import socket

import numpy as np
import pytest
import torch
from conftest import assistant, tiny_config, tiny_model, user
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.ablation.train_arm import Arm, aligned_model, release_span
from pointalign.alignment import AlignmentConfig, LayerTap
from pointalign.models import PointAlignForConditionalGeneration, PointAlignPhiConfig
from pointalign.trainer import AlignedModel

Q = 4


@pytest.fixture
def batch(processor, clouds):
    talks = [
        [user("What is this?", clouds[0]), assistant("A bench made of wood.")],
        [user("Tell me everything about it, please.", clouds[1]), assistant("A lamp.")],
    ]
    return processor.apply_chat_template(talks, tokenize=True, return_labels=True)


def aligned(qformer_trains=False, **config):
    model = tiny_model()
    model.requires_grad_(False)
    model.model.qformer.requires_grad_(qformer_trains)
    return AlignedModel(model, AlignmentConfig(layer=[2], **config)).train()


def tapped(wrapped, batch):
    """The mask whose hidden states are aligned."""
    seen = []
    capture = LayerTap.capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerTap, "capture", lambda tap, mask: seen.append(mask) or capture(tap, mask))
        loss = wrapped(**batch)["alignment_loss"]
    return seen[0].bool(), loss


def test_1_the_point_tokens_are_aligned_and_nothing_else(batch):
    ours, loss = tapped(aligned(), batch)
    assert torch.equal(ours, batch["point_mask"].bool()) and ours.sum() == 2 * Q
    arm = aligned_model(aligned().model, Arm(span="release", layer=[2]), AlignmentConfig().weight, seed=0)
    release, released_loss = tapped(arm, batch)
    assert not (release & ours).any()  # not one of the release's places holds a point token
    ends = [int((row != -100).nonzero()[0]) for row in batch["labels"]]
    assert release.sum(dim=1).tolist() == [Q, Q] and release[:, max(ends) - Q : max(ends)].all()
    assert loss != released_loss
    with pytest.raises(ValueError, match="answer in every row"):
        release_span(torch.full((1, 8), -100), Q)
    with pytest.raises(ValueError, match="expected one of points, release"):
        Arm(span="last")


def test_2_a_failing_alignment_stops_the_step(batch):
    wrapped = aligned()
    wrapped.alignment.alignment_projector[0].projector[0] = torch.nn.Linear(5, 5)
    with pytest.raises(RuntimeError, match="shape"):
        wrapped(**batch)


def test_3_layer_weight_and_queries_are_options_and_one_layer_is_kept(batch, monkeypatch):
    wrapped = aligned(weight=0.5)
    with wrapped.tap.capture(batch["point_mask"]) as hidden:
        output = wrapped.model(**batch)
    assert list(hidden) == [2] and hidden[2].shape == (2 * Q, 32) and output.hidden_states is None
    losses = wrapped(**batch)
    torch.testing.assert_close(losses["loss"], losses["ntp_loss"] + 0.5 * losses["alignment_loss"])


@pytest.mark.parametrize("trains", [False, True])
def test_4_no_dropout_in_the_targets_or_at_inference(batch, trains):
    from pointalign.models import adapters

    wrapped = aligned(qformer_trains=trains)
    adapters.add(
        wrapped.model, "qformer", r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["query", "key", "value"]
    )
    for name, parameter in wrapped.model.model.qformer.named_parameters():
        parameter.requires_grad_(trains)
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    wrapped.train()
    points = {name: batch[name] for name in ("point_values", "point_lengths")}
    features = wrapped.model.encode_point_clouds(points["point_values"], points["point_lengths"])
    again = wrapped.model.encode_point_clouds(points["point_values"], points["point_lengths"])
    assert torch.equal(features.qformer, again.qformer) == (not trains)  # what trains may have dropout
    assert torch.equal(wrapped.target(features, {}), wrapped.target(again, {}))
    assert not wrapped.target(features, {}).requires_grad
    wrapped.eval()
    with torch.no_grad():
        clean = wrapped.model.get_qformer_features(**points)
        assert torch.equal(clean, wrapped.model.get_qformer_features(**points))
        wrapped.train()
        torch.testing.assert_close(wrapped.target(features, {}), clean.flatten(0, 1))


def test_5_sampling_is_deterministic_and_neighbours_are_exact():
    encoder = tiny_model().model.point_encoder
    points = torch.rand(2, 200, 6, generator=torch.Generator().manual_seed(0)) + torch.tensor([30.0, 0, 0, 0, 0, 0])
    groups, centres = encoder.group(points)
    torch.manual_seed(99)
    for one, other in zip(encoder.half().group(points), (groups, centres), strict=True):
        assert torch.equal(one, other)  # neither the seed nor the weights' precision matters
    exact = torch.cdist(centres.double(), points[..., :3].double()).topk(4, largest=False).values
    found = groups[..., :3].double().norm(dim=-1).sort(dim=-1).values
    torch.testing.assert_close(found, exact.sort(dim=-1).values, atol=1e-5, rtol=0)


class Syncs(TorchDispatchMode):
    """Counts what waits for the device on a GPU: values that Python reads, and shapes that depend on data."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.after: list[str] = []  # operators that wait once `started`
        self.started = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        waits = func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2)
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # a mask as index: counted first
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += waits
        if waits and self.started:
            self.after.append(str(func))
        return func(*args, **(kwargs or {}))


def syncs_of_a_step(batch, num_layers, nan_checks=False):
    config = tiny_config()
    config.text_config.num_hidden_layers = num_layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * num_layers
    wrapped = AlignedModel(PointAlignForConditionalGeneration(config), AlignmentConfig(layer=[2])).train()

    def check(_module, _args, output):
        assert not torch.isnan(output).any()

    for layer in wrapped.model.get_decoder().layers if nan_checks else []:
        layer.register_forward_hook(check)
    with Syncs() as syncs:
        wrapped(**batch)["loss"].backward()
    return syncs.count


def test_6_no_synchronisation_per_decoder_layer(batch):
    shallow, deep = syncs_of_a_step(batch, 4), syncs_of_a_step(batch, 8)
    assert shallow == deep
    assert syncs_of_a_step(batch, 8, nan_checks=True) == deep + 8  # the released code's check of every layer is seen


def test_6_nothing_waits_once_the_first_layer_runs(batch):
    """From there to the end of the backward pass the host only launches, and stays ahead of the device."""
    wrapped = AlignedModel(PointAlignForConditionalGeneration(tiny_config()), AlignmentConfig(layer=[2])).train()
    with Syncs() as syncs:
        first = wrapped.model.get_decoder().layers[0]
        first.register_forward_pre_hook(lambda *_: setattr(syncs, "started", True))
        wrapped(**batch)["loss"].backward()
        assert syncs.started and syncs.count and not syncs.after
        batch["labels"][batch["labels"] != -100]
    assert len(syncs.after) == 1  # what waits is seen


def test_7_nothing_is_fetched_when_a_model_is_made(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = tiny_config()
    config.text_config = PointAlignPhiConfig(
        hidden_size=40, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=32,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    PointAlignForConditionalGeneration(config)


def test_7_a_language_model_in_the_wrong_format_is_refused(tmp_path, tokenizer):
    import made_published as made

    from pointalign import build
    from pointalign.model_options import DataOptions, ModelOptions

    fused = made.save_llm(tmp_path / "fused", made.phi(fused=True), shards=1)
    tokenizer.save_pretrained(fused)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj"):
        build.build_model(ModelOptions(llm=str(fused)), DataOptions())


def test_8_scores_only_where_a_label_is(batch):
    model = tiny_model().train()
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: rows.append(args[0].numel() // 32))
    model(**batch)
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())]


def test_9_frozen_features_may_be_computed_once(batch):
    model = tiny_model()
    with torch.no_grad():
        features = model.get_qformer_features(batch["point_values"], batch["point_lengths"])
        rest = {name: one for name, one in batch.items() if name not in ("point_values", "point_lengths")}
        torch.testing.assert_close(model(**rest, query_features=features).logits, model(**batch).logits)


def test_10_every_point_is_read_and_answers_end_at_the_tokenizers_own_mark(processor, tokenizer):
    cloud = np.random.default_rng(0).random((256, 6)).astype(np.float32)
    assert len(processor.feature_extractor.prepare(cloud)) == 256
    assert processor.end_token_ids() == [tokenizer.eos_token_id]
