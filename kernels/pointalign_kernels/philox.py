"""Philox 4x32, random numbers from a key and a counter, in plain PyTorch; Triton has its own of the same numbers."""

from torch import Tensor

ROUNDS = 7  # the fewest that pass BigCrush, by the paper
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words of 32 bits, in int64 tensors as key and counter are, which broadcast."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # of their 64 bits none is lost, the sign is a bit
        c0, c1 = (second >> 32 & LOW) ^ c1 ^ k0, second & LOW
        c2, c3 = (first >> 32 & LOW) ^ c3 ^ k1, first & LOW
        k0, k1 = k0 + KEY_STEPS[0] & LOW, k1 + KEY_STEPS[1] & LOW
    return c0, c1, c2, c3
