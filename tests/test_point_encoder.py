"""PointBERT against the published formulas, computed here in the plainest way."""

import pytest
import torch
from conftest import lively, tiny_config
from torch.nn import functional

from pointalign.models import PointBertModel
from pointalign.models.point_encoder import MiniPointNet


def plain_groups(cloud, num_groups, size):
    """FPS from point 0 and k nearest neighbours of one cloud `[N, C]`, one point at a time."""
    chosen = [0]
    while len(chosen) < num_groups:
        gaps = [min(float(((p - cloud[c, :3]) ** 2).sum()) for c in chosen) for p in cloud[:, :3]]
        chosen.append(gaps.index(max(gaps)))
    groups = []
    for centre in chosen:
        gaps = [float(((p - cloud[centre, :3]) ** 2).sum()) for p in cloud[:, :3]]
        near = sorted(range(len(cloud)), key=lambda i: (gaps[i], i))[:size]
        group = cloud[near].clone()
        group[:, :3] -= cloud[centre, :3]
        groups.append(group)
    return torch.stack(groups), cloud[chosen, :3]


def plain_mini_pointnet(net, groups, training=False):
    """Convolutions over `[groups, C, k]` and an explicit `[global, local]`."""

    def norm(x, bn):
        return functional.batch_norm(
            x, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, training, eps=bn.eps
        )

    x = groups.flatten(0, 1).transpose(1, 2)
    conv, bn, _, last = net.first_conv
    x = functional.conv1d(norm(functional.conv1d(x, conv.weight, conv.bias), bn).relu(), last.weight, last.bias)
    whole = x.max(dim=2, keepdim=True).values.expand_as(x)
    x = torch.cat([whole, x], dim=1)
    conv, bn, _, last = net.second_conv
    x = functional.conv1d(norm(functional.conv1d(x, conv.weight, conv.bias), bn).relu(), last.weight, last.bias)
    return x.max(dim=2).values.view(*groups.shape[:2], -1)


def plain_encoder(model, points):
    config, state = model.config, model.state_dict()
    tokens = []
    for cloud in points:
        groups, centres = plain_groups(cloud, config.num_groups, config.group_size)
        x = plain_mini_pointnet(model.encoder, groups[None])[0] @ state["reduce_dim.weight"].T
        x = torch.cat([state["cls_token"][0], x + state["reduce_dim.bias"]])
        hidden = functional.gelu(centres @ state["pos_embed.0.weight"].T + state["pos_embed.0.bias"])
        position = torch.cat([state["cls_pos"][0], hidden @ state["pos_embed.2.weight"].T + state["pos_embed.2.bias"]])
        for i in range(config.num_hidden_layers):
            block = {
                name.removeprefix(f"blocks.blocks.{i}."): one
                for name, one in state.items()
                if name.startswith(f"blocks.blocks.{i}.")
            }
            x = x + position
            y = functional.layer_norm(x, x.shape[-1:], block["norm1.weight"], block["norm1.bias"], eps=1e-5)
            q, k, v = (y @ block["attn.qkv.weight"].T).chunk(3, dim=-1)
            heads = []
            for q_h, k_h, v_h in zip(
                *(one.chunk(config.num_attention_heads, dim=-1) for one in (q, k, v)), strict=True
            ):
                heads.append((q_h @ k_h.T / q_h.shape[-1] ** 0.5).softmax(dim=-1) @ v_h)
            x = x + torch.cat(heads, dim=-1) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
            y = functional.layer_norm(x, x.shape[-1:], block["norm2.weight"], block["norm2.bias"], eps=1e-5)
            y = functional.gelu(y @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
            x = x + y @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
        tokens.append(functional.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], eps=1e-5))
    return torch.stack(tokens)


@pytest.fixture
def encoder():
    return lively(PointBertModel(tiny_config().point_config).eval())


def test_the_encoder_computes_the_published_formulas(encoder):
    points = torch.rand(2, 40, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = encoder(points)
        assert tokens.shape == (2, 9, 16)
        torch.testing.assert_close(tokens, plain_encoder(encoder, points), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_mini_pointnet_equals_convolutions_over_a_concatenation(training):
    torch.manual_seed(0)
    net = lively(MiniPointNet(6, 8, 8)).train(training)
    groups = torch.randn(2, 5, 7, 6, requires_grad=True)
    weight = torch.randn(2, 5, 8)
    expected = plain_mini_pointnet(net, groups, training)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), groups)
    got = net(groups)
    (gradient,) = torch.autograd.grad((got * weight).sum(), groups)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


def test_neither_order_of_the_rest_nor_batch_mates_matter(encoder):
    points = torch.rand(3, 40, 6, generator=torch.Generator().manual_seed(2))
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(39, generator=torch.Generator().manual_seed(3))])
    tokens = encoder(points)
    torch.testing.assert_close(encoder(points[1:2])[0], tokens[1])
    torch.testing.assert_close(encoder(points[:, order]), tokens)


def test_equal_points_and_ties_are_no_trouble(encoder):
    points = torch.rand(1, 10, 6).repeat(1, 4, 1)
    assert encoder(points).isfinite().all()


def test_too_few_points_say_how_many_are_needed(encoder):
    with pytest.raises(ValueError, match=r"at least 8 points .*8 groups of 4.*got 7"):
        encoder(torch.rand(1, 7, 6))


def test_while_the_encoder_trains_fewer_groups_may_do():
    config = tiny_config().point_config
    config.num_training_groups = 5
    encoder = PointBertModel(config)
    points = torch.rand(2, 40, 6, generator=torch.Generator().manual_seed(1))
    assert encoder.train()(points).shape == (2, 6, 16)
    torch.testing.assert_close(encoder.group(points)[1], encoder.eval().group(points)[1][:, :5])
    assert encoder(points).shape == (2, 9, 16)
    assert encoder.train().requires_grad_(False)(points).shape == (2, 9, 16), "frozen, it sees all"
