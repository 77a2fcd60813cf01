"""A mixture of query experts (MiniGPT-3D, stage 4): a router weighs several sets of queries of the Q-Former.

Shape legend: C clouds, E experts, K experts in use, Q query tokens per cloud, D width of the Q-Former, G groups.
"""

import torch
from torch import Tensor, nn

ROUTINGS = ("sparse", "soft", "constant")
ROUTER_WIDTH = 256


class QueryExperts(nn.Module):
    """Queries `[E, Q, D]` and a router that reads the point encoder's tokens.

    Args:
        queries: `[1, Q, D]`, with which every expert starts.
        num_experts: E.
        token_width: width of the encoder's tokens.
        routing: `sparse` weighs the `top_k` most probable experts by their probabilities, which then sum to less than
            1; `soft` weighs all experts by probability; `constant` weighs all alike.
        top_k: K of `sparse`.

    Raises:
        ValueError: an unknown routing, or `top_k` out of range.
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
        """Queries `[C, K, Q, D]` and weights `[C, K]` for encoder tokens `[C, 1 + G, token_width]`, cls first."""
        if self.routing == "constant":
            weights = tokens.new_full((len(tokens), len(self.queries)), 1 / len(self.queries))
        else:
            weights = self.router(torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)).softmax(dim=-1)
        if self.routing != "sparse":
            return self.queries.expand(len(tokens), -1, -1, -1), weights
        chosen = weights.topk(self.top_k, dim=-1).indices.sort(dim=-1).values
        return self.queries[chosen], weights.gather(1, chosen)
