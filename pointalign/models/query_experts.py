"""A mixture of query experts (MiniGPT-3D, stage 4): a router weighs several sets of queries for one Q-Former.

Shape legend: C clouds, E experts, K experts in use, Q query tokens per cloud, D width of the Q-Former.
"""

import torch
from torch import Tensor, nn

ROUTINGS = ("sparse", "soft", "constant")
ROUTER_WIDTH = 256


class QueryExperts(nn.Module):
    """Queries `[E, Q, D]` and a router on what the encoder saw.

    Args:
        queries: `[1, Q, D]`, what every expert starts from.
        num_experts: E.
        token_width: width of the encoder's tokens.
        routing: `sparse` takes the `top_k` likeliest experts, their probabilities not renormalised; `soft` all of them
            by probability; `constant` all alike.
        top_k: K of `sparse`.
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
        """Queries `[C, K, Q, D]` and weights `[C, K]` for encoder tokens `[C, 1 + G, width]`, cls first."""
        if self.routing == "constant":
            weights = tokens.new_full((len(tokens), len(self.queries)), 1 / len(self.queries))
        else:
            weights = self.router(torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)).softmax(dim=-1)
        if self.routing != "sparse":
            return self.queries.expand(len(tokens), -1, -1, -1), weights
        chosen = weights.topk(self.top_k, dim=-1).indices.sort(dim=-1).values
        return self.queries[chosen], weights.gather(1, chosen)
