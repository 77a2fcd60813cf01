"""The decoder in CUDA graphs trains step by step as without; on a CPU, with recorded operators in place of graphs."""

from contextlib import ExitStack

import pytest
import torch
from made_graphs import CpuRecorder, masked_attention
from test_fused import adapted
from test_packing import collate, conversations  # noqa: F401
from transformers import AttentionInterface

from pointalign.alignment import AlignmentConfig
from pointalign.data.collator import IGNORED, PackShape, fill, pack
from pointalign.efficient import fused_parts
from pointalign.efficient.fused_lora import AdapterGroup
from pointalign.efficient.graphs import CudaRecorder, decoder_in_graphs
from pointalign.trainer import AlignedModel

SHAPE = PackShape(400, 8, 120)


def batches_of(processor, conversations):  # noqa: F811
    """Batches of unequal samples, tokens and clouds, all of one shape."""
    orders = ([0, 1, 2, 3], [2, 0], [1, 3, 1], [3, 2, 0])
    return [fill(pack(collate(processor, [conversations[place] for place in order])), SHAPE) for order in orders]


def on(device, batch):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def train(aligned, batches, recorder, autocast):
    """Losses and gradients of steps of one, two and one batches, with an evaluation in between."""
    device = next(aligned.parameters()).device
    parameters = [parameter for parameter in aligned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    torch.manual_seed(3)
    steps = []
    with ExitStack() as stack:
        stack.enter_context(fused_parts.applied(aligned.model))
        if recorder is not None:
            stack.enter_context(decoder_in_graphs(aligned.model.get_decoder(), recorder))
        for step in ([0], [1, 2], [3]):
            losses = []
            for place in step:
                batch = on(device, batches[place])
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    loss = aligned(**batch, num_items_in_batch=20, num_point_rows=torch.tensor(16))["loss"]
                loss.backward()
                losses.append(loss.item())
            steps.append((losses, [None if p.grad is None else p.grad.clone() for p in parameters]))
            optimizer.step()
            optimizer.zero_grad()
            aligned.eval()
            with torch.no_grad():  # of another shape and dtype
                losses.append(aligned(**on(device, batches[step[0]]))["loss"].item())
            aligned.train()
    return steps


def aligned_model(architecture="phi", dropout=0.2):
    aligned = AlignedModel(adapted(architecture, dropout=dropout), AlignmentConfig(weight=0.5, layer=[2]))
    aligned.model.model.language_model.set_attn_implementation("masked")
    return aligned.train()


def assert_same_steps(actual, expected, tolerance):
    for (losses, gradients), (true_losses, truth) in zip(actual, expected, strict=True):
        assert losses == pytest.approx(true_losses, rel=tolerance)
        for gradient, true_gradient in zip(gradients, truth, strict=True):
            assert (gradient is None) == (true_gradient is None)
            if gradient is not None:
                assert (gradient - true_gradient).norm() <= 10 * tolerance * true_gradient.norm() + 1e-8


@pytest.mark.parametrize(
    ("architecture", "autocast", "counted"),  # every pair of values; all eight take twice as long
    [("phi", False, False), ("phi", True, True), ("llama", False, True), ("llama", True, False)],
)
def test_recorded_steps_equal_plain_steps(processor, conversations, architecture, autocast, counted, monkeypatch):  # noqa: F811
    if counted:
        monkeypatch.setattr(AdapterGroup, "draws_from_counter", lambda group, rows: True)
    batches = batches_of(processor, conversations)
    expected = train(aligned_model(architecture), batches, None, autocast)
    actual = train(aligned_model(architecture), batches, CpuRecorder(), autocast)
    assert_same_steps(actual, expected, 1e-6)
    assert any(gradient is not None and gradient.any() for gradient in expected[-1][1])


def test_cuda_graphs_equal_plain_steps(processor, conversations):  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from test_lean_cuda import on_cuda

    def model():
        aligned = on_cuda("phi")
        aligned.model.model.language_model.set_attn_implementation("varlen")
        return aligned

    batches = batches_of(processor, conversations)
    for batch in batches:
        batch["point_values"] = batch["point_values"].repeat(1, 40, 1)
        batch["point_lengths"] = batch["point_lengths"] * 40
    expected = train(model(), batches, None, True)
    actual = train(model(), batches, CudaRecorder(), True)
    assert_same_steps(actual, expected, 1e-2)


def test_what_a_graph_cannot_repeat_is_refused(processor, conversations):  # noqa: F811
    batch, *_ = batches_of(processor, conversations)
    aligned = aligned_model()
    tokens = (batch["labels"] != IGNORED).sum()
    with decoder_in_graphs(aligned.model.get_decoder(), CpuRecorder()):
        first = aligned(**batch, num_items_in_batch=tokens)["loss"]
        with pytest.raises(ValueError, match="a CUDA graph repeats one shape"):
            aligned(**fill(pack(collate(processor, conversations)), SHAPE._replace(tokens=401)))
        aligned(**batch, num_items_in_batch=tokens)
        with pytest.raises(RuntimeError, match="ran again before this backward pass"):
            first.backward()
    assert "forward" not in vars(aligned.model.get_decoder())


def test_a_pass_that_waits_for_the_device_is_not_recorded(processor, conversations, monkeypatch):  # noqa: F811
    def waiting(*arguments, cu_seq_lens_q, **options):
        assert int(cu_seq_lens_q[1]) > 0
        return masked_attention(*arguments, cu_seq_lens_q=cu_seq_lens_q, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "masked", waiting)
    batch, *_ = batches_of(processor, conversations)
    aligned = aligned_model()
    with decoder_in_graphs(aligned.model.get_decoder(), CpuRecorder()), pytest.raises(RuntimeError, match="waits"):
        aligned(**batch)
