"""The fused alignment loss against the reference: on a GPU as it is, elsewhere through Triton's interpreter.

The interpreter multiplies bf16 wrongly, so bf16 and the full grid of sizes run on a GPU only.
"""

import importlib
import itertools
import os

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pointalign_kernels
from pointalign_kernels import alignment, reference
from pointalign_kernels.alignment_tiles import TILES, BackwardTile, Tile, Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
CAPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative L2
# Of the upstream gradient in fp16, as a GradScaler does it: the mean over hundreds of rows leaves gradients so small
# that fp16 holds them as subnormal numbers, of a few bits.
GRADIENT_SCALE = 1024
ROWS = (1, 33, 127, 128, 320, 512, 1000)
HIDDEN = (576, 2048, 2560, 4096, 1001)
WIDTHS = (1664, 2048, 333)
FEATURES = (256, 384, 576, 768, 2560)
SMALL = (33, 48, 40, 24)  # M, C, H, D
TABLE_ROWS = (1, 33, 127)
TRAJECTORY_STEPS = 50
OPCHECKS = ((None, False, DTYPES[:2]), (2, True, DTYPES[:2]))  # layers, shared, dtypes of the products
SHORT = DEVICE == "cpu" and "POINTALIGN_LONG_TESTS" not in os.environ
if SHORT:
    # The interpreter takes its time by programs and steps of their loops, so these are the least that have each edge of
    # its tiles: one row; a tile that is not full and one that is; several tiles and steps, even (512) and not (333).
    # `make test-long` interprets all of them.
    ROWS, HIDDEN, WIDTHS, FEATURES = (1, 127, 128, 320), (576, 1001), (512, 333), (256, 768)
    TABLE_ROWS, TRAJECTORY_STEPS = (1, 130), 15
    OPCHECKS = ((None, False, DTYPES[:1]), (2, True, DTYPES[1:2]))
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these run through test_alignment_interpreted.py", allow_module_level=True)
kernels = pytest.importorskip("pointalign_kernels.alignment_triton", reason="the fused kernels need triton")
ops = importlib.import_module("pointalign_kernels.alignment")


def problem(sizes=SMALL, dtype=torch.float32, layers=None, shared=False, seed=0) -> list[torch.Tensor]:
    """hidden, target, three weights, three biases: exactly representable in `dtype`."""
    rows, inputs, width, features = sizes
    generator = torch.Generator().manual_seed(seed)
    many = () if layers is None else (layers,)
    stack = () if shared else many

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    shapes = ((width, inputs), (width, width), (features, width))
    weights = [draw(*stack, *shape, scale=shape[1] ** -0.5) for shape in shapes]
    biases = [draw(*stack, shape[0], scale=0.1) for shape in shapes]
    return [draw(*many, rows, inputs), draw(rows, features), *weights, *biases]


def evaluate(tensors, impl, dtype=None, autocast=None, scale=1) -> list[torch.Tensor]:
    """Loss, gradient of hidden and of the six parameters, under an upstream gradient that differs between layers.

    `scale` multiplies the upstream gradient.
    """
    dtype = dtype or tensors[0].dtype
    leaves = [tensor.detach().to(dtype).requires_grad_(place != 1) for place, tensor in enumerate(tensors)]
    hidden, target, *parameters = leaves
    with torch.autocast(DEVICE, dtype=autocast, enabled=autocast is not None):
        loss = pointalign_kernels.alignment_loss(hidden, target, parameters[:3], parameters[3:], impl=impl)
    factor = scale * torch.arange(1.0, loss.numel() + 1, device=DEVICE).view(loss.shape)
    (loss * factor).sum().backward()
    return [loss.detach(), hidden.grad, *(parameter.grad for parameter in parameters)]


def assert_as_accurate(tensors, cap=None, autocast=None) -> list[torch.Tensor]:
    """Against fp64: no worse than 2x (loss) or 3x (gradients) PyTorch in the same dtype, and within a relative cap.

    Returns what the kernels computed.
    """
    compute = autocast or tensors[0].dtype
    cap = cap or CAPS[compute]
    scale = GRADIENT_SCALE if compute == torch.float16 else 1
    truth = evaluate(tensors, "reference", torch.float64, scale=scale)
    eager = evaluate(tensors, "reference", autocast=autocast, scale=scale)
    fused = evaluate(tensors, "triton", autocast=autocast, scale=scale)
    for place, (true, theirs, ours) in enumerate(zip(truth, eager, fused, strict=True)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        length = true.norm() + 1e-30
        own = (theirs.double() - true).norm() / length
        error = (ours.double() - true).norm() / length
        allowed = (2 if place == 0 else 3) * own + cap / 10
        assert error <= min(allowed, cap), f"output {place}: error {error:.2e}, PyTorch's {own:.2e}, cap {cap:.0e}"
    return fused


def vary(**factors) -> list[tuple[int, ...]]:
    """SMALL with one size changed at a time; on a GPU the whole grid of realistic sizes."""
    if DEVICE == "cuda":
        return list(itertools.product((1, 33, 127, 512, 1000), HIDDEN, WIDTHS, FEATURES))
    places = {"rows": 0, "inputs": 1, "width": 2, "features": 3}
    return [
        tuple(size if place == places[name] else small for place, small in enumerate(SMALL))
        for name, sizes in factors.items()
        for size in sizes
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", vary(rows=ROWS, inputs=HIDDEN, width=WIDTHS, features=FEATURES), ids=str)
def test_sizes(sizes, dtype):
    assert_as_accurate(problem(sizes, dtype))


def test_the_gradient_scale_takes_fp16_gradients_out_of_the_subnormal_numbers():
    """At 1000 rows PyTorch itself misses the cap without the scale, and keeps it with it."""
    tensors = problem((1000, 48, 40, 768), torch.float16)
    subnormal, errors = [], []
    for scale in (1, GRADIENT_SCALE):
        truth = evaluate(tensors, "reference", torch.float64, scale=scale)[1:]
        eager = evaluate(tensors, "reference", scale=scale)[1:]
        subnormal.append((truth[0].abs() < torch.finfo(torch.float16).tiny).double().mean().item())
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(eager, truth, strict=True)])
    assert subnormal[0] > 0.95 and subnormal[1] < 0.1, subnormal
    assert max(errors[0]) > 2 * CAPS[torch.float16] and max(errors[1]) < CAPS[torch.float16], errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", (False, True), ids=("stacked", "shared"))
def test_several_layers(shared, dtype):
    assert_as_accurate(problem(dtype=dtype, layers=3, shared=shared))


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU runs the tiles of its own table")
@pytest.mark.parametrize("shared", (False, True), ids=("stacked", "shared"))
def test_many_small_tiles_and_split_k(monkeypatch, shared):
    large, small, wide = Tile(32, 16, 16, 4, 1), Tile(16, 16, 16, 4, 1), Tile(16, 32, 32, 4, 1)
    tiles = Tiles((large, small), 0.75, (BackwardTile(large, wide), BackwardTile(small, large)), 0.375)
    monkeypatch.setattr(kernels, "INTERPRETER_TILES", tiles)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 64)
    assert_as_accurate(problem((33, 50, 41, 23), layers=2, shared=shared))


def table_tiles() -> list[Tiles]:
    """Each tile of the table of sm_90 as the only choice."""
    table = TILES[90]
    count = max(len(table.linear), len(table.backward))
    pairs = [(table.linear[i % len(table.linear)], table.backward[i % len(table.backward)]) for i in range(count)]
    return [Tiles((linear,), 0, (backward,), 0) for linear, backward in pairs]


@pytest.mark.parametrize("rows", TABLE_ROWS)
@pytest.mark.parametrize("tiles", table_tiles(), ids=lambda tiles: f"{tiles.linear[0][:3]}-{tiles.backward[0].dw[:3]}")
def test_every_tile_of_the_table_is_exact_and_writes_everything(monkeypatch, tiles, rows):
    monkeypatch.setattr(kernels, "_tiles", lambda device, dtype: tiles)
    tensors = problem((rows, 144, 136, 72))
    assert_written_and_bit_equal(tensors, assert_as_accurate(tensors))


@pytest.mark.parametrize("layers,shared", ((None, False), (2, False), (2, True)))
@pytest.mark.parametrize("impl", ("reference", "triton"))
def test_no_rows(impl, layers, shared):
    loss, *gradients = evaluate(problem((0, *SMALL[1:]), layers=layers, shared=shared), impl)
    assert loss.shape == (() if layers is None else (layers,))
    assert not loss.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("length", (0.0, 1e-9, 5e-9, 1e-7))
def test_short_projections(length):
    """Around and below the clamp of the norms, in fp32; the projection equals the last bias."""
    tensors = problem()
    for parameter in (tensors[4], tensors[6]):
        parameter.zero_()
    tensors[7].mul_(length / tensors[7].norm())
    assert_as_accurate(tensors)


def test_zero_rows_and_zero_targets():
    tensors = problem()
    tensors[0][3] = 0
    tensors[1][5] = 0
    assert_as_accurate(tensors)


def test_half_precision_saturates_where_the_projection_vanishes():
    tensors = problem(dtype=torch.float16)
    for parameter in (tensors[4], tensors[7]):
        parameter.zero_()
    loss, *gradients = evaluate(tensors, "triton")
    assert loss == 1
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
def test_bad_rows_reach_loss_and_gradients(poison):
    tensors = problem()
    tensors[0][7, 1] = poison
    loss, *gradients = evaluate(tensors, "triton")
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_a_bad_row_stays_in_its_layer():
    tensors = problem(layers=2)
    tensors[0][1, 7, 1] = float("nan")
    loss, hidden, *_ = evaluate(tensors, "triton")
    assert loss[0].isfinite() and loss[1].isnan()
    assert hidden[0].isfinite().all()


def test_strided_inputs():
    tensors = problem()
    expected = evaluate(tensors, "triton")
    tensors[0] = tensors[0].T.contiguous().T
    tensors[1] = torch.stack([tensors[1], tensors[1]], dim=-1)[..., 0]
    tensors[2] = tensors[2].repeat(1, 2)[:, : SMALL[1]]
    assert not any(tensor.is_contiguous() for tensor in tensors[:3])
    for ours, theirs in zip(evaluate(tensors, "triton"), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_zero_stride_inputs():
    tensors = problem()
    tensors[0] = tensors[0][:1].expand(SMALL[0], -1)
    tensors[1] = tensors[1][:1].expand(SMALL[0], -1)
    assert_as_accurate(tensors)


def test_expanded_upstream_gradient():
    tensors = problem(layers=3)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradients = []
    for impl in ("reference", "triton"):
        loss = pointalign_kernels.alignment_loss(leaves[0], tensors[1], leaves[2:5], leaves[5:], impl=impl)
        gradients.append(torch.autograd.grad(loss.mean(), leaves[0])[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def assert_written_and_bit_equal(tensors, first) -> None:
    """A second run equals the first. Deterministic mode fills fresh memory with NaN, so what no kernel wrote shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        second = evaluate(tensors, "triton")
    finally:
        torch.use_deterministic_algorithms(enabled)
    for before, after in zip(first, second, strict=True):
        assert before.isfinite().all() and torch.equal(before, after)


def test_every_output_is_written_and_runs_are_bit_equal():
    tensors = problem((127, 65, 47, 30))
    assert_written_and_bit_equal(tensors, evaluate(tensors, "triton"))


@pytest.mark.parametrize("hidden_dtype", (torch.float32, None), ids=("fp32-hidden", "half-hidden"))
def test_autocast_keeps_master_weights(hidden_dtype):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    tensors = [tensor.float() for tensor in problem(dtype=dtype)]
    tensors[0] = tensors[0].to(hidden_dtype or dtype)
    hidden = tensors[0].detach().requires_grad_()
    parameters = [tensor.detach().requires_grad_() for tensor in tensors[2:]]
    gradients = []
    for impl in ("reference", "triton"):
        with torch.autocast(DEVICE, dtype=dtype):
            loss = pointalign_kernels.alignment_loss(hidden, tensors[1], parameters[:3], parameters[3:], impl=impl)
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss, (hidden, *parameters)))
    for theirs, ours in zip(*gradients, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).norm() <= CAPS[dtype] * theirs.float().norm()


def test_autocast_is_as_accurate():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    assert_as_accurate([tensor.float() for tensor in problem((33, 65, 47, 30), dtype)], autocast=dtype)


@pytest.mark.parametrize("trained", ("hidden", "parameters"))
def test_only_wanted_gradients(trained):
    tensors = problem()
    wanted = tensors[:1] if trained == "hidden" else tensors[2:]
    for tensor in wanted:
        tensor.requires_grad_()
    loss = pointalign_kernels.alignment_loss(tensors[0], tensors[1], tensors[2:5], tensors[5:], impl="triton")
    loss.backward()
    expected = evaluate(tensors, "triton")
    for tensor, gradient in zip(wanted, expected[1:2] if trained == "hidden" else expected[2:], strict=True):
        assert torch.equal(tensor.grad, gradient)
    assert all((tensor.grad is not None) == tensor.requires_grad for tensor in tensors)


def test_one_trained_parameter():
    tensors = problem()
    tensors[3].requires_grad_()
    loss = pointalign_kernels.alignment_loss(tensors[0], tensors[1], tensors[2:5], tensors[5:], impl="triton")
    loss.backward()
    assert torch.equal(tensors[3].grad, evaluate(tensors, "triton")[3])


def test_gradcheck_of_the_reference():
    for layers, shared in ((None, False), (2, False), (2, True)):
        tensors = [t.double().requires_grad_(i != 1) for i, t in enumerate(problem((3, 5, 4, 3), None, layers, shared))]

        def loss(hidden, *parameters, target=tensors[1]):
            return reference.alignment_loss(hidden, target, parameters[:3], parameters[3:])

        assert torch.autograd.gradcheck(loss, (tensors[0], *tensors[2:]))


def test_reference_is_cosine_similarity():
    hidden, target, *parameters = problem()
    projected = hidden
    for weight, bias in zip(parameters[:2], parameters[3:5], strict=True):
        projected = functional.silu(functional.linear(projected, weight, bias))
    projected = functional.linear(projected, parameters[2], parameters[5])
    expected = 1 - functional.cosine_similarity(projected, target, dim=-1).mean()
    torch.testing.assert_close(reference.alignment_loss(hidden, target, parameters[:3], parameters[3:]), expected)


@pytest.mark.parametrize("layers,shared,dtypes", OPCHECKS)
def test_opcheck(layers, shared, dtypes):
    hidden, target, *parameters = problem((5, 20, 18, 17), None, layers, shared)
    lead = hidden if layers else hidden[None]
    weights = [weight if weight.dim() == 3 else weight[None] for weight in parameters[:3]]
    biases = [bias if bias.dim() == 2 else bias[None] for bias in parameters[3:]]
    for dtype in dtypes:
        leaves = [[tensor.detach().requires_grad_() for tensor in group] for group in (weights, biases)]
        inputs = (lead.detach().requires_grad_(), target, *leaves, dtype)
        torch.library.opcheck(ops.alignment_forward, inputs, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        loss, *saved = ops.alignment_forward(lead, target, weights, biases, torch.float32)
        dy, pre, act, *copies = saved
        inputs = (torch.ones_like(loss), lead, dy, pre, act, weights, biases, *copies, True, True)
        torch.library.opcheck(ops.alignment_backward, inputs)


@pytest.mark.parametrize("autocast", (False, True))
def test_fullgraph_compile(autocast):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16

    def step(hidden, target, weights, biases):
        with torch.autocast(DEVICE, dtype=dtype, enabled=autocast):
            loss = pointalign_kernels.alignment_loss(hidden * 2, target, weights, biases, impl="triton")
        return loss * 3

    tensors = problem()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")):
        leaves = [tensor.detach().requires_grad_(place != 1) for place, tensor in enumerate(tensors)]
        loss = run(leaves[0], leaves[1], leaves[2:5], leaves[5:])
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_activation_checkpointing():
    tensors = problem()
    hidden = tensors[0].detach().requires_grad_()

    def step(hidden):
        return pointalign_kernels.alignment_loss(hidden.sin(), tensors[1], tensors[2:5], tensors[5:], impl="triton")

    (expected,) = torch.autograd.grad(step(hidden), hidden)
    (gradient,) = torch.autograd.grad(checkpoint(step, hidden, use_reentrant=False), hidden)
    assert torch.equal(gradient, expected)


def test_the_backward_runs_one_operator():
    """Nothing around it: no zeros for outputs without gradients, no casts, no rescaling."""
    tensors = [tensor.detach().requires_grad_(place != 1) for place, tensor in enumerate(problem())]
    loss = pointalign_kernels.alignment_loss(tensors[0], tensors[1], tensors[2:5], tensors[5:], impl="triton")
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        torch.autograd.grad(loss, [tensors[0], *tensors[2:]])
    free = ("aten.ones_like", "aten.detach", "aten.view", "aten.squeeze", "aten.unsqueeze")
    assert [name for name in called if not name.startswith(free)] == ["pointalign.alignment_backward.default"]


class Projector(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.weights = torch.nn.ParameterList(tensor.clone() for tensor in tensors[2:5])
        self.biases = torch.nn.ParameterList(tensor.clone() for tensor in tensors[5:])

    def forward(self, hidden, target, impl="triton"):
        return pointalign_kernels.alignment_loss(hidden, target, list(self.weights), list(self.biases), impl=impl)


def test_distributed_data_parallel(tmp_path):
    tensors = problem()
    expected = evaluate(tensors, "triton")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = torch.nn.parallel.DistributedDataParallel(Projector(tensors).to(DEVICE))
        module(tensors[0], tensors[1]).backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(module.parameters(), expected[2:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_training_trajectory():
    """Optimizer steps from one start: the curves of both implementations stay within 1e-4."""
    tensors = problem(SMALL, seed=3)
    curves = []
    for impl in ("reference", "triton"):
        module = Projector(tensors).to(DEVICE)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.15 / TRAJECTORY_STEPS)
        curve = []
        for _ in range(TRAJECTORY_STEPS):
            loss = module(tensors[0], tensors[1], impl)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0] / 2
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-4)


def test_saved_memory_is_activations_only():
    """No weight copy, no hidden copy outside autocast: z and a of two layers and one [M, D] gradient."""
    rows, _, width, features = SMALL
    tensors = [tensor.detach().requires_grad_(place != 1) for place, tensor in enumerate(problem())]
    inputs = {tensor.data_ptr() for tensor in tensors}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in inputs:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pointalign_kernels.alignment_loss(tensors[0], tensors[1], tensors[2:5], tensors[5:], impl="triton")
    assert sum(saved) == rows * (4 * width + features)


def test_rejections(monkeypatch):
    hidden, target, *parameters = problem()
    weights, biases = parameters[:3], parameters[3:]
    loss = pointalign_kernels.alignment_loss
    with pytest.raises(ValueError, match="impl='fast'"):
        loss(hidden, target, weights, biases, impl="fast")
    with pytest.raises(ValueError, match="target: expected"):
        loss(hidden, target[:-1], weights, biases)
    with pytest.raises(ValueError, match="linear 1: expected weight"):
        loss(hidden, target, [weights[0], weights[1][:-1], weights[2]], biases, impl="triton")
    with pytest.raises(ValueError, match="three weights"):
        loss(hidden, target, weights[1:], biases[1:], impl="triton")
    with pytest.raises(ValueError, match="one dtype"):
        loss(hidden.half(), target, weights, biases, impl="triton")
    with pytest.raises(ValueError, match="expected one of"):
        loss(hidden.double(), target, weights, biases, impl="triton")
    with pytest.raises(ValueError, match="stacked weights"):
        loss(hidden, target, [w[None] for w in weights], [b[None] for b in biases], impl="triton")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="bfloat16"):
            loss(*(tensor.bfloat16() for tensor in (hidden, target)), weights, biases, impl="triton")
        monkeypatch.delenv("TRITON_INTERPRET")
        assert not pointalign_kernels.fused_available("cpu")
        with pytest.raises(RuntimeError, match="impl='reference' runs anywhere"):
            loss(hidden, target, weights, biases, impl="triton")
        assert loss(hidden, target, weights, biases) == reference.alignment_loss(hidden, target, weights, biases)


def test_auto_takes_the_fused_form():
    assert alignment.fused_available(DEVICE)
    assert not alignment.fused_available("xpu")
    hidden, target, *parameters = problem()
    arguments = hidden, target, parameters[:3], parameters[3:]
    assert pointalign_kernels.alignment_loss(*arguments) == pointalign_kernels.alignment_loss(*arguments, impl="triton")


@needs_gpu
def test_cuda_graph_replay():
    """`make_graphed_callables` as documented: replays follow new inputs and new weights."""
    tensors = problem((512, 2560, 1664, 768), torch.bfloat16)
    module = Projector(tensors).to(DEVICE)
    sample = (tensors[0].detach().clone().requires_grad_(), tensors[1].clone())
    graphed = torch.cuda.make_graphed_callables(module, sample)
    for seed in range(3):
        hidden, target, *parameters = problem((512, 2560, 1664, 768), torch.bfloat16, seed=seed)
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), parameters, strict=True):
                parameter.copy_(value)
        module.zero_grad()
        graphed(hidden.requires_grad_(), target).backward()
        expected = evaluate([hidden.detach(), target, *parameters], "triton")
        assert torch.equal(hidden.grad, expected[1])
        for parameter, gradient in zip(module.parameters(), expected[2:], strict=True):
            assert torch.equal(parameter.grad, gradient)


@needs_gpu
def test_no_host_synchronisation():
    tensors = problem((128, 576, 333, 256))
    evaluate(tensors, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(tensors, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
