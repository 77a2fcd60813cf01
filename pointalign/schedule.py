"""The learning rate of the published runs (LAVIS's linear warm-up and cosine)."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def published_rate(step: int, steps: int, warmup_steps: int, warmup: float, peak: float, minimum: float) -> float:
    """Linear from `warmup` to `peak`, then a cosine that counts the whole run, warm-up included, down to `minimum`."""
    if step < warmup_steps:
        return warmup + (peak - warmup) * step / warmup_steps
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def published_schedule(
    optimizer: Optimizer, steps: int, warmup_steps: int, warmup: float, peak: float, minimum: float
) -> LambdaLR:
    """A scheduler of `published_rate`, as a factor on each group's own rate."""
    return LambdaLR(optimizer, lambda step: published_rate(step, steps, warmup_steps, warmup, peak, minimum) / peak)
