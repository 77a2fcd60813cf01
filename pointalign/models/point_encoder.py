"""PointBERT: groups of neighbouring points become tokens, a transformer relates them; `QueryExperts` reads its tokens.

Shape legend: B clouds, N points, C channels (xyz first), G groups, k points per group, T = 1 + G tokens, D width.
Parameter names are those of the published checkpoints (PointBERT, PointLLM, MiniGPT-3D).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pointalign.models.configuration import PointBertConfig
from pointalign_kernels import farthest_point_sample, group_points
from pointalign_kernels.folded_pointnet import FoldedPointNet, folded_pointnet


def _as_linear(convolution: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """Weight `[out, in]` and bias of a 1x1 convolution, copied."""
    weight = convolution.weight[..., 0].clone()
    return weight, torch.zeros_like(weight[:, 0]) if convolution.bias is None else convolution.bias.clone()


def _folded(convolution: nn.Conv1d, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """The weight `[out, in]` and bias of a 1x1 convolution followed by a BatchNorm in eval mode, folded in fp64."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm with no running statistics cannot be folded: expected track_running_stats")
    weight, bias = (tensor.double() for tensor in _as_linear(convolution))
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight.double(), norm.bias.double()
    dtype = convolution.weight.dtype
    return (weight * scale[:, None]).to(dtype), ((bias - norm.running_mean.double()) * scale + shift).to(dtype)


def _checked_layers(name: str, block: nn.Sequential) -> tuple[nn.Conv1d, nn.BatchNorm1d, nn.Conv1d]:
    """The layers of `first_conv` or `second_conv` but for the activation. Raises: ValueError: built otherwise."""
    kinds = (nn.Conv1d, nn.BatchNorm1d, nn.ReLU, nn.Conv1d)
    if len(block) != 4 or not all(isinstance(layer, kind) for layer, kind in zip(block, kinds, strict=True)):
        raise ValueError(f"{name}: expected Conv1d, BatchNorm1d, ReLU, Conv1d, got {block}")
    if block.training or block[1].training:
        raise ValueError(f"{name}: expected a module in evaluation mode, call eval() before folding")
    return block[0], block[1], block[3]


@torch.no_grad()
def fold_pointnet(first_conv: nn.Sequential, second_conv: nn.Sequential) -> FoldedPointNet:
    """Folds the BatchNorms of a frozen `MiniPointNet` into its weights: equal to it within fp32 rounding.

    The weights, of the same dtype and device, are copies: fold again after the module changes or moves.

    Raises:
        ValueError: a module is built otherwise, is in training mode (its BatchNorm would use the batch) or has no
            running statistics.
    """
    first, first_norm, lift = _checked_layers("first_conv", first_conv)
    second, second_norm, last = _checked_layers("second_conv", second_conv)
    weight, bias = _folded(second, second_norm)
    width = weight.shape[1] // 2
    return FoldedPointNet(
        first=_folded(first, first_norm),
        lift=_as_linear(lift),
        shared=(weight[:, :width].contiguous(), bias),
        local=weight[:, width:].contiguous(),
        last=_as_linear(last),
    )


class MiniPointNet(nn.Module):
    """A vector per group, `[B, G, k, C] -> [B, G, d]`, by point-wise convolutions and two maxima over the points.

    Args:
        in_channels: C.
        width: w, between the two halves.
        out_channels: d.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int):
        super().__init__()

        def convolutions(inputs: int, inner: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv1d(inputs, inner, 1), nn.BatchNorm1d(inner), nn.ReLU(), nn.Conv1d(inner, outputs, 1)
            )

        self.first_conv = convolutions(in_channels, width // 2, width)
        self.second_conv = convolutions(2 * width, 2 * width, out_channels)

    def forward(self, groups: Tensor) -> Tensor:
        """`[B, G, k, C] -> [B, G, d]`.

        The convolutions are matrix products over all points at once. The published module concatenates the group's
        maximum to every point before `second_conv`; here the global half of that product runs once per group and
        nothing is concatenated. All biases but the first are added once per group too, so that their gradients are
        sums over groups, not over points. A frozen module in evaluation mode runs with its BatchNorms folded.
        """
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if not self.training and not trains:
            # folded in every call: beside the products its time does not show, and what is stored could be stale
            return folded_pointnet(groups, fold_pointnet(self.first_conv, self.second_conv))
        batch, num_groups, size, channels = groups.shape
        first, norm, act, second = self.first_conv
        x = act(norm(functional.linear(groups.reshape(-1, channels), first.weight[..., 0], first.bias)))
        local = functional.linear(x, second.weight[..., 0])  # [B G k, w], without its bias
        bias: Tensor = second.bias  # type: ignore[assignment]
        maximum = local.view(batch * num_groups, size, -1).amax(dim=1) + bias  # [B G, w]
        first, norm, act, second = self.second_conv
        global_weight, local_weight = first.weight[..., 0].chunk(2, dim=1)
        x = functional.linear(local, local_weight).view(batch * num_groups, size, -1)
        per_group = functional.linear(maximum, global_weight, first.bias) + functional.linear(bias, local_weight)
        x = act(norm((x + per_group[:, None]).flatten(0, 1)))
        features = functional.linear(x, second.weight[..., 0])
        bias = second.bias  # type: ignore[assignment]
        return features.view(batch, num_groups, size, -1).amax(dim=2) + bias


class Attention(nn.Module):
    """Self-attention over tokens `[B, T, D]`."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)  # [B, heads, T, D / heads]
        return self.proj(attended.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """The two linear layers of a block with GELU between them."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Pre-norm blocks; the position embedding is added before every one of them."""

    def __init__(self, config: PointBertConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + position)
        return x


class PointBertModel(PreTrainedModel):
    """`points [B, N, C] -> tokens [B, 1 + G, D]`, the contract of every point encoder of this package.

    To use another encoder, register its configuration and a model with this contract with AutoConfig and AutoModel,
    and pass the configuration as `point_config`.
    """

    config_class = PointBertConfig
    base_model_prefix = "point_encoder"
    main_input_name = "points"
    config: PointBertConfig

    def __init__(self, config: PointBertConfig):
        super().__init__(config)
        width = config.hidden_size
        self.encoder = MiniPointNet(config.in_channels, config.pointnet_width or config.group_dim, config.group_dim)
        self.reduce_dim = nn.Linear(config.group_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = Transformer(config)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PointBertModel):
            nn.init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            nn.init.trunc_normal_(module.cls_pos, std=self.config.initializer_range)

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbourhoods `[B, G, k, C]` and their centres `[B, G, 3]`, in fp32; the first centre is point 0.

        Raises: ValueError: the clouds have fewer points than groups or than neighbours per group.
        """
        minimum = max(self.config.num_groups, self.config.group_size)
        if points.shape[1] < minimum:
            raise ValueError(
                f"expected clouds of at least {minimum} points (this encoder makes {self.config.num_groups} groups of "
                f"{self.config.group_size}), got {points.shape[1]}: sample more points"
            )
        points = points.float()
        count = self.config.num_groups
        if self.training and self.reduce_dim.weight.requires_grad:
            count = self.config.num_training_groups or count
        index = farthest_point_sample(points[..., :3].contiguous(), count)
        centres = points[..., :3].gather(1, index[..., None].expand(-1, -1, 3))
        return group_points(points, index, self.config.group_size), centres

    def forward(self, points: Tensor) -> Tensor:
        """`[B, N, C] -> [B, 1 + G, D]`, cls token first."""
        with torch.no_grad():  # nothing before the groups has parameters
            groups, centres = self.group(points)
        dtype = self.reduce_dim.weight.dtype
        tokens = self.reduce_dim(self.encoder(groups.to(dtype)))  # [B, G, D]
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        position = self.pos_embed(centres.to(dtype))
        position = torch.cat([self.cls_pos.expand(len(tokens), -1, -1), position], dim=1)
        return self.norm(self.blocks(x, position))


# -- what reads the tokens: E query experts, of which K are in use, with Q queries each -------------------------------

ROUTINGS = ("sparse", "soft", "constant")
ROUTER_WIDTH = 256


class QueryExperts(nn.Module):
    """Queries `[E, Q, D]` of the Q-Former and a router that reads the point encoder's tokens (MiniGPT-3D, stage 4).

    Args:
        queries: `[1, Q, D]`, with which every expert starts.
        num_experts: E.
        token_width: width of the encoder's tokens.
        routing: `sparse` weighs the `top_k` most probable experts by their probabilities, which then sum to less than
            1; `soft` weighs all experts by probability; `constant` weighs all alike.
        top_k: K of `sparse`.

    Raises: ValueError: an unknown routing, or `top_k` out of range.
    """

    def __init__(self, queries: Tensor, num_experts: int, token_width: int, routing: str = "sparse", top_k: int = 2):
        super().__init__()
        if routing not in ROUTINGS:
            raise ValueError(f"query routing {routing!r}: expected one of {', '.join(ROUTINGS)}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: expected 1 to {num_experts}, the number of query experts")
        self.routing, self.top_k = routing, top_k
        self.queries = nn.Parameter(queries.detach().repeat(num_experts, 1, 1))
        self.router = nn.Sequential(
            nn.Linear(2 * token_width, ROUTER_WIDTH), nn.GELU(), nn.Linear(ROUTER_WIDTH, num_experts)
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, K, Q, D]` and weights `[B, K]` for encoder tokens `[B, 1 + G, token_width]`, cls first."""
        if self.routing == "constant":
            weights = tokens.new_full((len(tokens), len(self.queries)), 1 / len(self.queries))
        else:
            weights = self.router(torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)).softmax(dim=-1)
        if self.routing != "sparse":
            return self.queries.expand(len(tokens), -1, -1, -1), weights
        chosen = weights.topk(self.top_k, dim=-1).indices.sort(dim=-1).values
        return self.queries[chosen], weights.gather(1, chosen)
