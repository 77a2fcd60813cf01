"""Point ops: the native library gives the indices of the plain-PyTorch reference, bit for bit."""

import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_programs import run_program

from pointalign_kernels import farthest_point_sample, group_points, knn, point_ops, reference

DEVICES = [
    pytest.param(
        device,
        marks=pytest.mark.skipif(
            device not in point_ops.NATIVE_DEVICES or (device == "cuda" and not torch.cuda.is_available()),
            reason=f"no native point ops for {device} here: {point_ops._load_error or 'not built or no such device'}",
        ),
    )
    for device in ("cpu", "cuda")
]
needs_native_cpu = pytest.mark.skipif(
    "cpu" not in point_ops.NATIVE_DEVICES, reason=f"no native point ops: {point_ops._load_error}"
)


def uniform(batch, num_points, generator):
    return torch.rand(batch, num_points, 3, generator=generator) * 2 - 1


def sphere(batch, num_points, generator):
    return torch.nn.functional.normalize(torch.randn(batch, num_points, 3, generator=generator), dim=-1)


def grid(batch, num_points, generator):  # many exact ties, and duplicates once the 216 cells are full
    return torch.randint(0, 6, (batch, num_points, 3), generator=generator).float()


def duplicates(batch, num_points, generator):
    return torch.ones(batch, num_points, 3) * torch.rand(batch, 1, 3, generator=generator)


def line(batch, num_points, generator):
    return torch.rand(batch, num_points, 1, generator=generator) * torch.tensor([1.0, -2.0, 0.5])


def plane(batch, num_points, generator):
    return uniform(batch, num_points, generator) * torch.tensor([1.0, 1.0, 0.0])


def huge(batch, num_points, generator):  # some squared distances overflow to infinity
    return uniform(batch, num_points, generator) * 3e19


def tiny(batch, num_points, generator):  # squared distances are denormal
    return uniform(batch, num_points, generator) * 1e-20


def far(batch, num_points, generator):  # few significant bits left: ties by rounding
    return uniform(batch, num_points, generator) * 1e-3 + 1000


def clusters(batch, num_points, generator):
    centres = torch.rand(batch, num_points, 3, generator=generator).mul(4).floor() * 10
    return centres + torch.randn(batch, num_points, 3, generator=generator) * 1e-4


def sorted_line(batch, num_points, generator):  # file order along the curve, as scanners write it
    return uniform(batch, num_points, generator).sort(dim=1).values


CLOUDS = (uniform, sphere, grid, duplicates, line, plane, huge, tiny, far, clusters, sorted_line)


def check_all(points, num_samples, k, start_index=0, lengths=None, device="cpu"):
    """Every op, native on `device`, equals the reference on the CPU."""
    on_device = None if lengths is None else lengths.to(device)
    moved = points.to(device)
    expected = reference.farthest_point_sample(points, num_samples, start_index, lengths)
    index = farthest_point_sample(moved, num_samples, start_index, on_device, impl="native")
    assert torch.equal(index.cpu(), expected)
    centre_index = expected[:, :24]
    query = points[torch.arange(len(points))[:, None], centre_index]
    distance, neighbours = knn(query.to(device), moved, k, on_device, impl="native")
    expected_distance, expected_neighbours = reference.knn(query, points, k, lengths)
    assert torch.equal(neighbours.cpu(), expected_neighbours)
    assert torch.equal(distance.cpu(), expected_distance)
    groups = group_points(moved, centre_index.to(device), k, on_device, impl="native")
    assert torch.equal(groups.cpu(), reference.group_points(points, centre_index, k, lengths))


@pytest.fixture(params=["scan", "buckets"])
def cuda_variant(request, monkeypatch):
    """How the CUDA ops work, whatever they would choose."""
    monkeypatch.setenv("POINTALIGN_CUDA_POINT_OPS", request.param)


needs_cuda = pytest.mark.skipif(
    "cuda" not in point_ops.NATIVE_DEVICES or not torch.cuda.is_available(), reason="needs a CUDA build and a GPU"
)


@needs_cuda
@pytest.mark.usefixtures("cuda_variant")
@pytest.mark.parametrize("make", CLOUDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("num_points", [1, 33, 1000, 5000, 8192, 20000, 150000])
def test_both_cuda_variants_equal_the_reference(make, num_points):
    points = make(2, num_points, torch.Generator().manual_seed(num_points))
    lengths = torch.tensor([num_points, (num_points + 1) // 2])
    check_all(points, min(num_points + 2, 200), min(num_points + 3, 40), num_points // 3, lengths, device="cuda")


@needs_cuda
def test_an_unknown_cuda_variant_is_refused(monkeypatch):
    monkeypatch.setenv("POINTALIGN_CUDA_POINT_OPS", "fast")
    with pytest.raises((ValueError, RuntimeError), match="expected scan or buckets"):
        farthest_point_sample(torch.rand(1, 50, 3, device="cuda"), 4, impl="native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", CLOUDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("num_points", [1, 2, 15, 16, 17, 255, 256, 257, 1000, 8191])
def test_equals_the_reference(make, num_points, device):
    generator = torch.Generator().manual_seed(num_points)
    check_all(make(2, num_points, generator), min(num_points + 2, 200), min(num_points + 3, 32), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [sphere, grid, plane], ids=lambda make: make.__name__)
@pytest.mark.parametrize("num_points", [8192, 20000, 65536])
def test_large_clouds(make, num_points, device):
    points = make(1, num_points, torch.Generator().manual_seed(1))
    check_all(points, 300, 32, start_index=num_points // 3, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches(batch, device):
    check_all(sphere(batch, 300, torch.Generator().manual_seed(batch)), 64, 20, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [sphere, grid, duplicates], ids=lambda make: make.__name__)
def test_every_sample_and_every_neighbour(make, device):
    points = make(2, 500, torch.Generator().manual_seed(2))
    check_all(points, 500, 500, device=device)
    for k in (1, 16, 31, 33, 64, 65, 129):
        check_all(points, 5, k, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_lengths(device):
    points = uniform(5, 400, torch.Generator().manual_seed(3))
    lengths = torch.tensor([400, 1, 17, 256, 399])
    check_all(points, 450, 40, start_index=100, lengths=lengths, device=device)
    poisoned = points.clone()
    for row, length in zip(poisoned, lengths, strict=True):
        row[length:] = float("nan")
    expected = farthest_point_sample(points.to(device), 50, 0, lengths.to(device), impl="native")
    assert torch.equal(farthest_point_sample(poisoned.to(device), 50, 0, lengths.to(device), impl="native"), expected)
    assert torch.equal(farthest_point_sample(poisoned, 50, 0, lengths, impl="reference"), expected.cpu())
    for length, row in zip(lengths, expected.cpu(), strict=True):
        assert (row < length).all()
        assert (row[length:] == row[min(int(length), 50) - 1]).all()


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cloud(data, device):
    batch = data.draw(st.integers(1, 4), label="batch")
    num_points = data.draw(st.integers(1, 700), label="num_points")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    points = data.draw(st.sampled_from(CLOUDS), label="cloud")(batch, num_points, generator)
    points = points * 10.0 ** data.draw(st.integers(-15, 15), label="exponent")
    if not points.isfinite().all():
        points = points.clamp(-3e38, 3e38)
    lengths = None
    if data.draw(st.booleans(), label="ragged"):
        lengths = torch.randint(1, num_points + 1, (batch,), generator=generator)
    check_all(
        points,
        data.draw(st.integers(1, num_points + 5), label="num_samples"),
        data.draw(st.integers(1, min(num_points + 5, 80)), label="k"),
        data.draw(st.integers(0, num_points - 1), label="start_index"),
        lengths,
        device,
    )


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native_cpu)])
def test_definition(impl):
    """The ops do what the words say: checked with python loops in exact arithmetic on small integers."""
    points = grid(1, 60, torch.Generator().manual_seed(4))
    rows = points[0].int().tolist()

    def square(a, b):
        return sum((x - y) ** 2 for x, y in zip(rows[a], rows[b], strict=True))

    chosen = [7]
    while len(chosen) < 60:
        nearest = [min(square(i, j) for j in chosen) for i in range(60)]
        chosen.append(nearest.index(max(nearest)))
    assert farthest_point_sample(points, 60, 7, impl=impl)[0].tolist() == chosen
    distance, index = knn(points, points, 12, impl=impl)
    for i in range(60):
        expected = sorted((square(i, j), j) for j in range(60))[:12]
        assert list(zip(distance[0, i].int().tolist(), index[0, i].tolist(), strict=True)) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_group_dtypes_and_features(device):
    generator = torch.Generator().manual_seed(5)
    points = torch.cat([sphere(2, 900, generator), torch.rand(2, 900, 4, generator=generator)], dim=-1)
    points[0, 3, 3:] = torch.tensor([1e-7, 65520.0, float("nan"), 3e-5])  # features may hold anything
    points[0, 4, 3:] = torch.tensor([65519.99, -1e6, 6.1e-5, 5.96e-8])
    centre_index = torch.arange(40).expand(2, 40)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        groups = group_points(points.to(device), centre_index.to(device), 24, dtype=dtype, impl="native")
        expected = reference.group_points(points, centre_index, 24, dtype=dtype)
        assert groups.dtype == dtype
        assert torch.equal(groups.cpu().isnan(), expected.isnan())
        assert torch.equal(groups.cpu().nan_to_num(), expected.nan_to_num())
    half = points.to(torch.bfloat16)
    groups = group_points(half.to(device), centre_index.to(device), 24, impl="native")
    assert groups.dtype == torch.bfloat16
    expected = reference.group_points(half, centre_index, 24)
    assert torch.equal(groups.cpu().nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    """Slices of wider rows, transposed clouds and expanded batches need no copy by the caller."""
    base = uniform(3, 500, torch.Generator().manual_seed(6))
    wide = torch.cat([base, torch.full((3, 500, 3), float("nan"))], dim=-1).to(device)
    base = base.to(device)
    expected = farthest_point_sample(base, 50, impl="native")
    for points in (wide, wide[..., :3], base.transpose(1, 2).contiguous().transpose(1, 2), base.double()):
        assert torch.equal(farthest_point_sample(points, 50, impl="native"), expected)
        assert torch.equal(knn(points[:, :9, :3], points, 8, impl="native")[1], knn(base[:, :9], base, 8)[1])
    one = base[:1].expand(3, -1, -1)
    assert torch.equal(farthest_point_sample(one, 50, impl="native"), expected[:1].expand(3, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_coordinates_of_a_map_keep_their_shape(device, impl):
    """UTM metres in double precision: rounded to float32 they would lie on a grid of half a metre."""
    near = torch.rand(2, 600, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(20)) * 8
    near = (near * 2**10).round() / 2**10  # differences are exact in both places
    far = near + torch.tensor([500_000, 5_400_000, 0, 0, 0, 0], dtype=torch.float64)
    near, far = near.to(device), far.to(device)
    index = farthest_point_sample(near, 40, impl=impl)
    assert torch.equal(farthest_point_sample(far, 40, impl=impl), index)
    for got, expected in zip(knn(far[:, :9, :3], far, 8, impl=impl), knn(near[:, :9, :3], near, 8, impl=impl),
                             strict=True):  # fmt: skip
        assert torch.equal(got, expected)
    groups = group_points(far, index, 8, impl=impl)
    assert groups.dtype == torch.float32 and torch.equal(groups, group_points(near, index, 8, impl=impl))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_empty_batches_and_half_precision(device, impl):
    points = uniform(2, 50, torch.Generator().manual_seed(21)).to(device)
    none = torch.zeros(0, 4, dtype=torch.int64, device=device)
    assert farthest_point_sample(points[:0], 4, impl=impl).shape == (0, 4)
    assert [part.shape for part in knn(points[:0, :5], points[:0], 4, impl=impl)] == [(0, 5, 4)] * 2
    assert [part.shape for part in knn(points[:, :0], points, 4, impl=impl)] == [(2, 0, 4)] * 2
    assert group_points(points[:0], none, 4, impl=impl).shape == (0, 4, 4, 3)
    assert group_points(points, none.new_zeros(2, 0), 4, impl=impl).shape == (2, 0, 4, 3)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        cast = points.to(kind)
        index = farthest_point_sample(cast, 60, impl=impl)
        assert torch.equal(index, farthest_point_sample(cast.float(), 60, impl=impl))
        assert torch.equal(knn(cast[:, :3], cast, 60, impl=impl)[1], knn(cast[:, :3].float(), cast.float(), 60)[1])
        groups = group_points(cast, index[:, :5], 60, impl=impl)
        assert groups.dtype == (torch.float32 if kind == torch.float64 else kind) and groups.shape == (2, 5, 60, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_millions_of_points(device):
    """One cloud of 6 million points, as a scanner gives it, against exact arithmetic on its grid."""
    side = torch.arange(182, dtype=torch.float32)
    grid = torch.cartesian_prod(side, side, side)[:6_000_000]
    points = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(22))][None].to(device)
    index = farthest_point_sample(points, 3, impl="native")[0]
    first, second = points[0, index[0]], points[0, index[1]]
    distance = (points[0] - first).square().sum(dim=1)
    assert distance[index[1]] == distance.max()
    nearest = torch.minimum(distance, (points[0] - second).square().sum(dim=1))
    assert nearest[index[2]] == nearest.max()
    centre = (points[0] == 90).all(dim=1).nonzero()[:, 0][None]
    groups = group_points(points, centre, 7, impl="native")[0, 0].cpu()
    assert groups[0].abs().sum() == 0 and (groups[1:].square().sum(dim=1) == 1).all() and len(groups.unique(dim=0)) == 7


@needs_native_cpu
def test_threads_and_instruction_sets_give_the_same_bits():
    program = """
import torch
from pointalign_kernels import farthest_point_sample, knn, point_ops
points = torch.rand(5, 3000, 3, generator=torch.Generator().manual_seed(7))
for threads in (1, 2):
    torch.set_num_threads(threads)
    index = farthest_point_sample(points, 200, impl="native")
    distance, neighbours = knn(points[:, :100], points, 32, impl="native")
    print(point_ops._ops.instruction_set(), (index * torch.arange(1000).view(5, 200)).sum().item(),
          (neighbours * torch.arange(32)).sum().item(), distance.view(torch.int32).sum().item())
"""
    lines = []
    for capability in ("default", "avx2", "avx512"):
        result = run_program(program, ATEN_CPU_CAPABILITY=capability)
        assert result.returncode == 0, result.stderr
        lines += [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert lines[0][0] == lines[1][0] == "default"
    assert len({numbers for _, numbers in lines}) == 1, lines


BAD_CALLS = {
    "points[1, 7]": lambda impl, bad: farthest_point_sample(bad, 4, impl=impl),
    "points[1, 7]: knn": lambda impl, bad: knn(bad[:, :3], bad, 4, impl=impl),
    "points[1, 7]: group": lambda impl, bad: group_points(bad, torch.zeros(2, 1, dtype=torch.int64), 4, impl=impl),
    "query[1, 7]": lambda impl, bad: knn(bad, bad[:1].expand(2, -1, -1), 4, impl=impl),
    "start_index: expected 0 to 49, got 50": lambda impl, bad: farthest_point_sample(bad[:1], 4, 50, impl=impl),
    "num_samples: expected at least 1": lambda impl, bad: farthest_point_sample(bad[:1], 0, impl=impl),
    "k: expected at least 1": lambda impl, bad: knn(bad[:1], bad[:1], 0, impl=impl),
    "lengths": lambda impl, bad: farthest_point_sample(bad[:1], 4, 0, torch.tensor([51]), impl=impl),
    "lengths: expected int64 [B]": lambda impl, bad: farthest_point_sample(bad[:1], 4, 0, torch.ones(2), impl=impl),
    "centre_index": lambda impl, bad: group_points(bad[:1], torch.tensor([[50]]), 4, impl=impl),
    "expected at least one point": lambda impl, bad: farthest_point_sample(bad[:1, :0], 4, impl=impl),
    "query: expected a batch of 1": lambda impl, bad: knn(bad[:1].expand(2, -1, -1), bad[:1], 4, impl=impl),
    "points: expected [B, N, 3 + F], got [2, 3, 50]: this looks like [B, 3, N], pass points.transpose(1, 2)": (
        lambda impl, bad: farthest_point_sample(bad.transpose(1, 2), 4, impl=impl)
    ),
    "query: expected [B, Q, 3], got [2, 3, 50]: this looks like [B, 3, N]": (
        lambda impl, bad: knn(bad.transpose(1, 2), bad, 4, impl=impl)
    ),
    "points: expected [B, N, 3 + F], got [50, 3]: pass points[None]": (
        lambda impl, bad: farthest_point_sample(bad[0], 4, impl=impl)
    ),
    "points: expected [B, N, 3 + F], got [2, 50, 2]": lambda impl, bad: knn(bad, bad[..., :2], 4, impl=impl),
    "centre_index: expected int64 [B, G] with B = 1, got torch.int32 [1, 1]": (
        lambda impl, bad: group_points(bad[:1], torch.tensor([[0]], dtype=torch.int32), 4, impl=impl)
    ),
    "centre_index: expected int64 [B, G] with B = 2, got torch.int64 [1, 1]": (
        lambda impl, bad: group_points(bad, torch.tensor([[0]]), 4, impl=impl)
    ),
    "expected one of torch.float32": lambda impl, bad: group_points(
        bad[:1], torch.tensor([[0]]), 4, dtype=torch.float64, impl=impl
    ),
}


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native_cpu)])
@pytest.mark.parametrize("message", BAD_CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_bad_input_is_named(impl, message, value):
    bad = uniform(2, 50, torch.Generator().manual_seed(8))
    bad[1, 7, 1] = value
    bad[1, 9, 0] = value
    with pytest.raises(ValueError) as caught:
        BAD_CALLS[message](impl, bad)
    assert message.split(": knn")[0].split(": group")[0] in str(caught.value)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradients_take_the_reference(impl):
    points = uniform(1, 40, torch.Generator().manual_seed(9)).requires_grad_()
    group_points(points, torch.tensor([[0, 5]]), 4, impl=impl).square().sum().backward()
    assert points.grad is not None and points.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no gradient"):
        group_points(points, torch.tensor([[0, 5]]), 4, impl="native")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="expected one of auto, reference, native"):
        farthest_point_sample(torch.rand(1, 5, 3), 2, impl="triton")


def test_a_missing_library_is_announced_once_and_never_silently_replaced(monkeypatch, caplog):
    monkeypatch.setattr(point_ops, "NATIVE_DEVICES", frozenset())
    monkeypatch.setattr(point_ops, "_load_error", "a reason")
    point_ops._warn_once.cache_clear()
    points = uniform(1, 20, torch.Generator().manual_seed(10))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert farthest_point_sample(points, 4).shape == (1, 4)
    assert [record.message for record in caplog.records if "plain PyTorch" in record.message] == [
        "point ops on cpu run as plain PyTorch, which is slow: a reason (POINTALIGN_BUILD=cpu builds it)"
    ]
    with pytest.raises(RuntimeError, match="cannot run on cpu: a reason"):
        farthest_point_sample(points, 4, impl="native")


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    points = torch.rand(2, 300, 6, generator=torch.Generator().manual_seed(11)).to(device)
    lengths = torch.tensor([300, 40], device=device)
    ops = torch.ops.pointalign_kernels
    for length in (None, lengths):
        torch.library.opcheck(ops.farthest_point_sample.default, (points, 20, 0, length))
        torch.library.opcheck(ops.knn.default, (points[:, :10], points, 8, length))
        index = torch.zeros(2, 5, dtype=torch.int64, device=device)
        torch.library.opcheck(ops.group_points.default, (points, index, 8, length, torch.float16))


@pytest.mark.parametrize("device", DEVICES)
def test_fullgraph_compile(device):
    def tokens(points):
        index = farthest_point_sample(points, 16)
        return group_points(points, index, 8), knn(points[:, :4, :3], points, 3)[1]

    points = torch.rand(2, 200, 6, generator=torch.Generator().manual_seed(12)).to(device)
    compiled = torch.compile(tokens, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(points), tokens(points), strict=True):
        assert torch.equal(got, expected)


def greedy_radius_never_grows(points, index):
    """Each sample is as far from the earlier ones as any point is (whatever the start): greedy validity."""
    nearest = torch.full((len(points),), float("inf"))
    for previous, newest in pairwise(index):
        nearest = torch.minimum(nearest, reference.squared_distance(points, points[previous]))
        if nearest[newest] != nearest.max():
            return False
    return True


@needs_native_cpu
def test_fpsample_agrees():
    fpsample = pytest.importorskip("fpsample", reason="the fpsample wheel is not installed")
    points = sphere(1, 2000, torch.Generator().manual_seed(13))
    ours = farthest_point_sample(points, 300, 11, impl="native")[0]
    assert fpsample.fps_sampling(points[0].numpy(), 300, start_idx=11).tolist() == ours.tolist()
    bucket = fpsample.bucket_fps_kdline_sampling(points[0].numpy(), 300, 5, start_idx=11)
    bucket = torch.from_numpy(bucket.astype("int64"))
    assert greedy_radius_never_grows(points[0], bucket)  # this mode ignores its start index
    assert farthest_point_sample(points, 300, int(bucket[0]), impl="native")[0].tolist() == bucket.tolist()


@needs_native_cpu
def test_torch_quickfps_agrees():
    quickfps = pytest.importorskip("torch_quickfps", reason="the torch-quickfps wheel is not installed")
    points = sphere(2, 2000, torch.Generator().manual_seed(14))
    theirs = quickfps.sample_idx(points, 300, h=5, start_idx=11)
    for cloud, index in zip(points, theirs, strict=True):
        assert greedy_radius_never_grows(cloud, index)
        ours = farthest_point_sample(cloud[None], 300, int(index[0]), impl="native")[0]
        assert ours.tolist() == index.tolist()


@needs_native_cpu
def test_scipy_agrees():
    from scipy.spatial import cKDTree

    points = uniform(1, 4000, torch.Generator().manual_seed(15))
    _, index = knn(points[:, :200], points, 32, impl="native")
    _, expected = cKDTree(points[0].double().numpy()).query(points[0, :200].double().numpy(), 32)
    same = (index[0] == torch.from_numpy(expected)).float().mean()
    assert same > 0.999  # in float64 a few near-ties order differently


@needs_cuda
@pytest.mark.usefixtures("cuda_variant")
def test_cuda_survives_bad_input():
    """No synchronising check: results of NaN points are unspecified but stay inside the cloud."""
    points = uniform(3, 3000, torch.Generator().manual_seed(16)).cuda()
    points[0] = float("nan")
    points[1, ::2, 1] = float("inf")
    index = farthest_point_sample(points, 100, impl="native")
    assert ((index >= 0) & (index < 3000)).all()
    _, neighbours = knn(points[:, :50], points, 40, impl="native")
    assert ((neighbours >= 0) & (neighbours < 3000)).all()
    wild = torch.tensor([[-5, 10**12]], device="cuda").expand(3, 2)
    assert group_points(points, wild, 40, impl="native").shape == (3, 2, 40, 3)
    short = torch.tensor([-3, 0, 10**12], device="cuda")
    assert (farthest_point_sample(points, 100, 0, short, impl="native") >= 0).all()


@needs_cuda
@pytest.mark.usefixtures("cuda_variant")
def test_cuda_graph_and_streams():
    points = torch.rand(4, 8192, 6, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        farthest_point_sample(points, 64, impl="native")  # sets the kernels' attributes outside the capture
        group_points(points, torch.zeros(4, 1, dtype=torch.int64, device="cuda"), 32, impl="native")
        with torch.cuda.graph(graph):
            index = farthest_point_sample(points, 64, impl="native")
            groups = group_points(points, index, 32, impl="native")
    for _ in range(2):
        points.copy_(torch.rand(4, 8192, 6, device="cuda"))
        index.fill_(-1)
        groups.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = farthest_point_sample(points.cpu(), 64, impl="native")
        assert torch.equal(index.cpu(), expected)
        assert torch.equal(groups.cpu(), group_points(points.cpu(), expected, 32, impl="native"))
