"""liger-kernel's own kernels, called as `--fused` calls them on CUDA, in Triton's interpreter: a process of its own.

Its RMS norm does not run there; tests/test_lean_cuda.py has it on a GPU.
"""

import importlib.util

import pytest
import torch
from made_programs import run_program

SCRIPT = """
import torch
from torch.nn import functional
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb
from pointalign.efficient import fused_parts

torch.set_num_threads(1)
torch.manual_seed(0)


def same(found, expected, leaves):
    form = [torch.randn_like(one) for one in expected]
    sums = [sum((one * other).sum() for one, other in zip(some, form)) for some in (found, expected)]
    gradients = [torch.autograd.grad(one, leaves) for one in sums]
    for one, other in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


q, k = (torch.randn(2, 9, heads, 20).transpose(1, 2).requires_grad_() for heads in (4, 2))
angles = torch.randn(2, 9, 4).repeat(1, 1, 2)
given = (q[..., :8], k[..., :8], angles.cos(), angles.sin())  # a part of each head, as in Phi
expected = apply_rotary_pos_emb(*given)
same(fused_parts.liger_rotary()(*given), expected, (q, k))

fused_parts.ROWS_AT_ONCE = 10
rows, weight, bias = torch.randn(23, 16).requires_grad_(), torch.randn(101, 16), torch.randn(101)
targets = torch.randint(0, 101, (23,))
for one in (bias, None):
    expected = functional.cross_entropy(functional.linear(rows, weight, one), targets, reduction="sum")
    same([fused_parts.liger_cross_entropy()(rows, weight, targets, one)], [expected], [rows])
print("as plain")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_lean_cuda.py runs on the GPU itself")
def test_liger_in_the_interpreter():
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    done = run_program(SCRIPT, interpreted=True)
    assert "as plain" in done.stdout, done.stderr[-3000:]
