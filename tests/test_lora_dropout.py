"""Masks from a counter: the published bits, the statistics of dropout, the kernels in the interpreter or on a GPU."""

import os

import pytest
import torch
from made_interpreter import run_in_the_interpreter

from pointalign_kernels import lora_dropout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU or the interpreter"
)


def seed_of(number):
    return torch.tensor([number], device=DEVICE)


def words(key, counter):
    key, counter = (tuple(torch.tensor([word]) for word in given) for given in (key, counter))
    return [f"{int(word):08x}" for word in lora_dropout.philox(key, counter)]


def test_philox_has_the_published_bits():
    """The known answers of Random123 for Philox 4x32 with seven rounds."""
    assert words((0, 0), (0, 0, 0, 0)) == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    ones = 0xFFFFFFFF
    assert words((ones, ones), (ones,) * 4) == ["5207ddc2", "45165e59", "4d8ee751", "8c52f662"]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert words(pi[4:], pi[:4]) == ["4dfccaba", "190a87f0", "c47362ba", "b6b5242a"]


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_masks_drop_the_share_everywhere_and_independently(share):
    """Rows, columns and the eight places of an octet drop alike; other adapters, seeds and neighbours are unrelated."""
    rows, cols = 512, 512
    masks = [
        lora_dropout.dropout_mask(seed_of(seed), rows, cols, adapter, share)
        for seed, adapter in ((7, 0), (7, 1), (8, 0), (7 + 2**32, 0))
    ]
    dropped = [(~mask).double() for mask in masks]

    def deviation(values, count):  # in standard deviations of a mean of `count` draws
        return ((values - share) / (share * (1 - share) / count) ** 0.5).abs().max().item()

    for drop in dropped:
        assert deviation(drop.mean(), rows * cols) < 4
        assert deviation(drop.mean(0), rows) < 5 and deviation(drop.mean(1), cols) < 5
        assert deviation(drop.view(rows, -1, 8).mean((0, 1)), rows * cols / 8) < 4

    def correlation(first, second):
        return ((first - share) * (second - share)).mean().abs().item() / (share * (1 - share))

    bound = 4 / (rows * cols) ** 0.5
    for place, first in enumerate(dropped):
        for second in dropped[:place]:
            assert correlation(first, second) < bound
        assert correlation(first[1:], first[:-1]) < bound and correlation(first[:, 1:], first[:, :-1]) < bound
        assert correlation(first[:, 8:], first[:, :-8]) < bound


def test_a_mask_depends_on_its_place_only():
    """Neither on the number of rows nor on that of columns: a tile draws what the tensor draws."""
    large = lora_dropout.dropout_mask(seed_of(3), 40, 50, 2, 0.3)
    assert torch.equal(lora_dropout.dropout_mask(seed_of(3), 9, 21, 2, 0.3), large[:9, :21])


@pytest.mark.parametrize("share, kept", [(0.0, 64 * 64), (1.0, 0), (0.5 / lora_dropout.STEPS - 1e-9, 64 * 64)])
def test_nothing_or_everything(share, kept):
    assert lora_dropout.dropout_mask(seed_of(1), 64, 64, 0, share).sum() == kept
    assert lora_dropout.dropped_share(share) == round(share)


def test_seeds_come_from_the_generator_of_the_device():
    torch.manual_seed(5)
    first, second = lora_dropout.draw_seed(DEVICE), lora_dropout.draw_seed(DEVICE)
    torch.manual_seed(5)
    assert torch.equal(lora_dropout.draw_seed(DEVICE), first) and not torch.equal(first, second)
    assert first.device.type == DEVICE.type and int(first) >= 0


# -- the kernels -------------------------------------------------------------------------------------------------------

# Rows, columns, adapters, rank: less than a tile; no multiples of one; rank in two ranges; a single row.
SIZES = ((5, 24, 1, 4), (70, 75, 2, 8), (33, 72, 2, 80), (1, 64, 4, 16))


@runs_kernels
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_the_reference(monkeypatch, size, parts):
    from pointalign_kernels import lora_dropout_triton

    monkeypatch.setattr(lora_dropout_triton, "_parts", lambda x, programs, steps: min(parts, steps))
    rows, cols, adapters, rank = size
    generator = torch.Generator().manual_seed(0)
    x, down, dlow, start = (
        torch.randn(*shape, generator=generator).to(DEVICE)
        for shape in ((rows, cols), (adapters * rank, cols), (rows, adapters * rank), (rows, cols))
    )
    seed = seed_of(2**62 + 12345)
    options = (seed, adapters, 0.3)
    found = [
        lora_dropout.lora_dropout_down(x, down, *options, 1.7),
        lora_dropout.lora_dropout_down_gradient(x, dlow, *options, torch.full_like(down, float("nan"))),
        lora_dropout.lora_dropout_input_gradient_(start.clone(), dlow, down, *options),
    ]
    x, down, dlow, start = (tensor.double() for tensor in (x, down, dlow, start))
    expected = [
        lora_dropout.lora_dropout_down_reference(x, down, *options, 1.7),
        lora_dropout.lora_dropout_down_gradient_reference(x, dlow, *options),
        start + lora_dropout.lora_dropout_input_gradient_reference(dlow, down, *options),
    ]
    for result, truth in zip(found, expected, strict=True):
        assert (result - truth).norm() <= 1e-5 * truth.norm()


@runs_kernels
@pytest.mark.parametrize("size", [(5, 24, 1), (9, 67, 2)])
def test_kernels_draw_the_bits_of_the_reference(size):
    """Bit by bit: with A = 1 at a column, a product is that column of the mask."""
    rows, cols, adapters = size
    seed, share = seed_of(-(2**63) + 99), 0.4
    down = torch.eye(cols, device=DEVICE).repeat(adapters, 1)  # rank K
    masks = [lora_dropout.dropout_mask(seed, rows, cols, adapter, share).float() for adapter in range(adapters)]
    low = lora_dropout.lora_dropout_down(torch.ones(rows, cols, device=DEVICE), down, seed, adapters, share)
    assert torch.equal(low, torch.cat(masks, dim=1))
    ones = torch.ones(rows, cols * adapters, device=DEVICE)
    dx = torch.zeros(rows, cols, device=DEVICE)
    lora_dropout.lora_dropout_input_gradient_(dx, ones, down, seed, adapters, share)
    assert torch.equal(dx, sum(masks))
    dlow = torch.eye(rows, device=DEVICE).repeat(1, adapters)  # rank R
    out = torch.empty(rows * adapters, cols, device=DEVICE)
    lora_dropout.lora_dropout_down_gradient(torch.ones(rows, cols, device=DEVICE), dlow, seed, adapters, share, out)
    assert torch.equal(out, torch.cat(masks))


@runs_kernels
def test_kernels_in_16_bits():
    """As exact as PyTorch's products of the same inputs in 16 bits."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    x, down = torch.randn(100, 200, device=DEVICE).to(dtype), torch.randn(32, 200, device=DEVICE).to(dtype)
    options = (seed_of(11), 2, 0.05)
    truth = lora_dropout.lora_dropout_down_reference(x.double(), down.double(), *options)
    plain = lora_dropout.lora_dropout_down_reference(x, down, *options)
    found = lora_dropout.lora_dropout_down(x, down, *options)
    assert found.dtype == dtype
    assert (found - truth).norm() <= 2 * (plain - truth).norm() + 1e-6


@runs_kernels
def test_no_rows():
    x, down = torch.zeros(0, 16, device=DEVICE), torch.ones(4, 16, device=DEVICE)
    options = (seed_of(1), 1, 0.5)
    assert lora_dropout.lora_dropout_down(x, down, *options).shape == (0, 4)
    out = torch.full((4, 16), float("nan"), device=DEVICE)
    dlow = torch.zeros(0, 4, device=DEVICE)
    assert (lora_dropout.lora_dropout_down_gradient(x, dlow, *options, out) == 0).all()
    assert lora_dropout.lora_dropout_input_gradient_(x.clone(), dlow, down, *options).shape == (0, 16)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="this process runs the kernels itself")
def test_kernels_in_the_interpreter():
    assert "passed" in run_in_the_interpreter(__file__)
