"""The recipes of the published stages: what trains at the paper's sizes, at which rates, in which groups."""

from itertools import pairwise

import pytest
import torch

from pointalign import build
from pointalign.alignment import Alignment
from pointalign.models import PointAlignConfig, PointAlignForConditionalGeneration, PointAlignPhiConfig
from pointalign.options import parse, published_rate

TRAINABLE = {
    "stage1_mlp": 1_378_432,
    "stage2_bridge": 47_417_984,
    "stage3_instruct": 47_417_984,
    "stage4_experts": 395_528,
    "align": 31_628_800 + 8_310_784,
}


@pytest.fixture(scope="module")
def language_config():
    return PointAlignPhiConfig()


@pytest.mark.parametrize("recipe", TRAINABLE)
def test_the_trainable_parameters_are_the_papers(recipe, language_config, capsys):
    options = parse([recipe])
    config = PointAlignConfig.from_preset(options.model.preset, language_config)
    with torch.device("meta"):
        model = PointAlignForConditionalGeneration(config)
        build.add_adapters(model, options.model)
        if options.model.query_experts:
            model.model.add_query_experts(options.model.query_experts, options.model.query_routing)
    build.set_trainable(model, options.model.train)
    count = sum(one.numel() for one in model.parameters() if one.requires_grad)
    if options.alignment.weight:
        layers = options.alignment.layers(language_config.num_hidden_layers)
        assert layers == [15] and options.alignment.weight == 0.1
        alignment = Alignment(options.alignment, layers, language_config.hidden_size, config.qformer_config.hidden_size)
        count += sum(one.numel() for one in alignment.parameters())
    with capsys.disabled():
        print(f" {recipe}: {count:,} trainable", end="")
    assert count == TRAINABLE[recipe]


def test_rates_steps_and_batches_are_the_papers():
    published = {
        "stage1_mlp": (3e-5, 1e-5, 1e-6, 7000, 70000),
        "stage2_bridge": (3e-5, 1e-5, 1e-6, 7000, 70000),
        "stage3_instruct": (1e-5, 1e-6, 1e-6, 3000, 30000),
        "stage4_experts": (5e-6, 1e-6, 1e-6, 1000, 10000),
        "align": (3e-6, 1e-7, 1e-7, 1000, 10000),
    }
    for recipe, (peak, minimum, warmup, warmup_steps, steps) in published.items():
        options = parse([recipe])
        training = options.training
        assert training.learning_rate == peak and training.minimum_learning_rate == minimum, recipe
        assert training.warmup_learning_rate == warmup and training.warmup_steps == warmup_steps, recipe
        assert (training.max_steps, training.weight_decay, training.seed) == (steps, 0.05, 42), recipe
        assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.999, 0.0), recipe
        assert (options.model.lora_rank, options.model.lora_alpha, options.model.lora_dropout) == (64, 16, 0.05)
        if recipe.startswith(("stage1", "stage2")):
            assert training.per_device_train_batch_size == 9 and options.data.types == ["simple_description"]
        else:
            mixture = [(one.types, one.ratio, one.batch_size) for one in options.data.mixture]
            assert mixture == [(["detailed_description"], 2, 6), (["single_round"], 3, 10), (["multi_round"], 3, 4)]


def test_the_schedule_warms_up_in_a_line_and_ends_at_its_minimum():
    rate = [published_rate(step, 1000, 100, 1e-6, 3e-5, 1e-5) for step in range(1001)]
    assert rate[0] == 1e-6 and rate[50] == pytest.approx((1e-6 + 3e-5) / 2)
    assert rate[500] == pytest.approx(2e-5) and rate[1000] == pytest.approx(1e-5)  # the cosine spans the warm-up too
    assert all(a > b for a, b in pairwise(rate[100:]))


def test_weight_decay_spares_norms_and_biases(tmp_path):
    from conftest import tiny_config

    from pointalign.trainer import AlignedModel, PointAlignTrainer

    options = parse(["stage2_bridge", "--training.output_dir", str(tmp_path), "--training.use_cpu", "true"])
    config = tiny_config()
    text = PointAlignPhiConfig(
        hidden_size=40, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=32,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = PointAlignForConditionalGeneration(
        type(config)(
            text_config=text,
            point_config=config.point_config,
            qformer_config=config.qformer_config,
            num_query_tokens=4,
            projector_hidden_size=16,
        )
    )
    build.add_adapters(model, options.model)
    build.set_trainable(model, options.model.train)
    trainer = PointAlignTrainer(model=AlignedModel(model, options.alignment), args=options.training)
    decayed, spared = trainer.create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert all(one.ndim > 1 for one in decayed["params"]) and all(one.ndim == 1 for one in spared["params"])
    assert {one.dtype for group in (decayed, spared) for one in group["params"]} == {torch.float32}
    scheduler = trainer.create_scheduler(70000)
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-6)


def test_a_part_that_the_model_lacks_is_named():
    from conftest import tiny_model

    with pytest.raises(ValueError, match="this model has no llm_norms"):
        build.set_trainable(tiny_model(), ["modality_projector", "llm_norms"])
