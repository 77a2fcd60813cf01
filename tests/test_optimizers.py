"""Every optimizer that transformers offers here saves and resumes exactly, or is refused before anything is loaded."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from pointalign import run_checkpoints
from pointalign.training_checks import check_arguments


def make(arguments):
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)  # large enough that optimizers with 8-bit states quantise them
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = optimizer_class(layer.parameters(), **options)
    return layer, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def step(layer, optimizer, scheduler, number):
    generator = torch.Generator().manual_seed(number)
    layer(torch.randn(8, 96, generator=generator)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_an_optimizer_resumes_exactly_or_is_refused(name, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), optim=name, use_cpu=True, report_to="none", remove_unused_columns=False
    )
    try:
        check_arguments(arguments)
    except ValueError as error:
        assert str(error).startswith(f"training.optim={name}: ")
        return
    layer, optimizer, scheduler = make(arguments)
    for number in range(2):
        step(layer, optimizer, scheduler, number)
    run_checkpoints.save_optimizer(tmp_path, optimizer, scheduler)
    again, resumed, its_scheduler = make(arguments)
    again.load_state_dict(layer.state_dict())
    run_checkpoints.load_optimizer(tmp_path, resumed, its_scheduler)
    for number in range(2, 4):
        step(layer, optimizer, scheduler, number)
        step(again, resumed, its_scheduler, number)
    assert torch.equal(layer.weight, again.weight) and torch.equal(layer.bias, again.bias)
