"""Every shipped recipe is a valid set of options, and the paper's values stand where they should."""

import re
from dataclasses import replace

import pytest

from pointalign.options import RECIPES, parse


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse_and_open_with_their_command(path):
    # `use_cpu` keeps the options from looking for devices
    options = parse([path.stem, "--training.use_cpu", "true"])
    assert options.training.output_dir.startswith("runs/")
    first = path.read_text().splitlines()[0]
    assert (
        first.startswith("# ")
        and re.search(r"pointalign[ .]train", first)
        and (path.stem in first or path.stem == "demo")
    )


def test_the_papers_values():
    options = parse(["align_24gb", "--training.use_cpu", "true"])
    model, alignment, training = options.model, options.alignment, options.training
    assert (model.lora_rank, model.lora_alpha, model.lora_dropout) == (64, 16, 0.05)
    assert (alignment.weight, alignment.layer, alignment.target) == (0.1, [15], "qformer")
    assert (training.max_steps, training.learning_rate, training.warmup_steps) == (10000, 3e-6, 1000)
    assert (training.weight_decay, training.max_grad_norm, training.seed) == (0.05, 0.0, 42)
    assert (training.minimum_learning_rate, training.warmup_learning_rate) == (1e-7, 1e-7)
    assert model.quantization == "nf4" and options.data.packing and not training.gradient_checkpointing


def test_recipes_by_size_of_machine_differ_in_what_the_machine_needs():
    recipes = ("align", "align_24gb", "align_2x24gb", "align_8x80gb")
    parsed = {name: parse([name, "--training.use_cpu", "true"]) for name in recipes}
    for name, options in parsed.items():
        expected = replace(parsed["align"].model, llm="models/converted", quantization=options.model.quantization)
        assert name == "align" or options.model == expected
        assert options.alignment == parsed["align"].alignment
        assert options.data.max_length == parsed["align"].data.max_length
        assert options.model.quantization == ("nf4" if "24gb" in name else "none")
    one, two = (parsed[name].training for name in ("align_24gb", "align_2x24gb"))
    batches = (one.per_device_train_batch_size, 2 * two.per_device_train_batch_size)
    assert abs(batches[0] - batches[1]) <= 1 and one.memory_limit_gb == two.memory_limit_gb <= 24
