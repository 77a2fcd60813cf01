"""Where the Q-Former looks: weights that sum to 1, equal those of transformers, and land on the right points."""

import numpy as np
import pytest
import torch
from conftest import lively, tiny_model

from pointalign.attention_maps import attention_maps, nearest_centres, query_attention


@pytest.fixture(scope="module")
def model():
    return lively(tiny_model())


@pytest.fixture
def values(clouds, processor) -> torch.Tensor:
    return processor.feature_extractor(clouds[:2])["point_values"]


def test_weights_sum_to_1_and_centres_are_points_of_the_cloud(model, values):
    maps = attention_maps(model, values)
    groups, queries = model.config.point_config.num_groups, model.config.num_query_tokens
    assert maps.weights.shape == (2, queries, 1 + groups) and maps.centres.shape == (2, groups, 3)
    torch.testing.assert_close(maps.weights.sum(dim=-1), torch.ones(2, queries))
    assert (maps.weights > 0).all() and maps.weights.std() > 0.01, "not the same everywhere"
    assert not torch.allclose(maps.weights[0], maps.weights[1], atol=1e-3), "another cloud, another look"
    for cloud, centres in zip(values, maps.centres, strict=True):
        assert (centres[:, None] == cloud[:, :3]).all(dim=2).any(dim=1).all()


def test_a_padded_cloud_has_the_map_that_it_has_alone(model, values):
    short = values[:1, :100]
    padded = torch.zeros_like(values)
    padded[0, :100], padded[1] = short[0], values[1]
    together = attention_maps(model, padded, torch.tensor([100, values.shape[1]]))
    alone = attention_maps(model, short)
    torch.testing.assert_close(together.weights[:1], alone.weights)
    torch.testing.assert_close(together.centres[:1], alone.centres)


def test_weights_equal_those_that_transformers_records(model, values):
    tokens = model.model.get_encoder_tokens(values)
    ours = query_attention(model, tokens)
    qformer, before = model.model.qformer, model.model.qformer.config._attn_implementation
    qformer.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            recorded = qformer(
                query_embeds=model.model.query_tokens.expand(2, -1, -1),
                encoder_hidden_states=model.model.point_mlp(tokens),
                output_attentions=True,
            ).cross_attentions
    finally:
        qformer.set_attn_implementation(before)
    layers = [weights for weights in recorded if weights is not None]
    assert layers
    torch.testing.assert_close(ours, torch.stack(layers).mean(dim=0).mean(dim=1), atol=1e-5, rtol=1e-4)


def test_query_experts_count_by_their_weight(values):
    model = lively(tiny_model())
    model.model.add_query_experts(3, "sparse", 2)
    with torch.no_grad():
        model.model.query_experts.queries.normal_(generator=torch.Generator().manual_seed(1))
        tokens = model.model.get_encoder_tokens(values)
        weights = query_attention(model, tokens)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))
        queries, routing = model.model.query_experts(tokens)
        parts = []
        for expert in range(2):  # each expert alone, for the first cloud
            model.model.query_experts, kept = None, model.model.query_experts
            model.model.query_tokens = torch.nn.Parameter(queries[:1, expert])
            parts.append(query_attention(model, tokens[:1]))
            model.model.query_tokens, model.model.query_experts = None, kept
    share = routing[0] / routing[0].sum()
    torch.testing.assert_close(weights[:1], share[0] * parts[0] + share[1] * parts[1])


def test_patches_are_compared_with_their_average(model, values):
    maps = attention_maps(model, values)
    for query in (None, 0, 3):
        patches = maps.on_patches(query)
        torch.testing.assert_close(patches.mean(dim=1), torch.ones(2))
    expected = maps.weights[:, 3, 1:]
    torch.testing.assert_close(maps.on_patches(3) * expected.mean(dim=1, keepdim=True), expected)


def test_every_point_takes_its_nearest_centre():
    centres = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    points = torch.tensor([[0.1, 0.1, 0], [0.9, 0.2, 0.3], [0.2, 3.0, 0], [1, 0, 0]])
    assert nearest_centres(points, centres).tolist() == [0, 1, 2, 1]


def test_an_encoder_that_hides_its_patches_is_refused(values):
    model = tiny_model()
    model.model.point_encoder = torch.nn.Identity()
    with pytest.raises(ValueError, match="no method `group`"):
        attention_maps(model, values)


def test_nothing_of_the_model_changes(model, values):
    before = model.encode_point_clouds(values).qformer
    hooks = [len(module._forward_hooks) for module in model.modules()]
    attention_maps(model, values)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    np.testing.assert_array_equal(before.detach(), model.encode_point_clouds(values).qformer.detach())
