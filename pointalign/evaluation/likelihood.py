"""How likely a model finds each of many answers: a closed set scored without generating.

The answers are merged into a tree of tokens behind the prompt, and every token sees the prompt and its own branch only,
so that one forward pass scores the whole set.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pointalign.models import PointAlignForConditionalGeneration


class AnswerTree:
    """Tokenised answers with common beginnings merged.

    Args:
        answers: token ids of each answer, in order.
    """

    def __init__(self, answers: Sequence[Sequence[int]]):
        nodes: dict[tuple[int, ...], int] = {}
        self.tokens: list[int] = []
        self.parents: list[int] = []  # -1 is the prompt's last token
        self.paths: list[list[int]] = []
        for answer in answers:
            path: list[int] = []
            for end in range(1, len(answer) + 1):
                key = tuple(answer[:end])
                if key not in nodes:
                    nodes[key] = len(self.tokens)
                    self.tokens.append(answer[end - 1])
                    self.parents.append(path[-1] if path else -1)
                path.append(nodes[key])
            self.paths.append(path)
        self.visible = np.eye(len(self.tokens), dtype=bool)  # [K, K] a node sees its ancestors and itself
        self.depth = np.zeros(len(self.tokens), dtype=np.int64)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                self.visible[node] |= self.visible[parent]
                self.depth[node] = self.depth[parent] + 1

    def mask(self, prompt_lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Additive attention mask `[B, 1, W + K, W + K]` behind prompts padded on the left to `width` W."""
        batch, nodes = len(prompt_lengths), len(self.tokens)
        device = prompt_lengths.device
        allowed = torch.zeros(batch, width + nodes, width + nodes, dtype=torch.bool, device=device)
        allowed[:, :, :width] = torch.ones(width + nodes, width, device=device).tril().bool()
        allowed[:, width:, width:] = torch.from_numpy(self.visible).to(device)
        real = torch.arange(width, device=device)[None] >= width - prompt_lengths[:, None]
        allowed[:, :, :width] &= real[:, None]
        allowed |= torch.eye(width + nodes, dtype=torch.bool, device=device)  # padding sees itself: no empty row
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


@torch.inference_mode()
def answer_likelihoods(
    model: PointAlignForConditionalGeneration, batch: dict[str, Tensor], tree: AnswerTree
) -> np.ndarray:
    """Log-likelihoods `[B, A]` of A answers after each prompt of a batch padded on the left.

    Args:
        batch: `input_ids`, `attention_mask`, and the point inputs of the model.
    """
    model.eval()
    input_ids = batch["input_ids"]
    rows, width = input_ids.shape
    lengths = batch["attention_mask"].sum(dim=1)
    prompt, _ = model.model.embed(
        input_ids,
        batch.get("point_values"),
        batch.get("point_lengths"),
        batch.get("point_mask"),
        batch.get("query_features"),
    )
    tokens = torch.tensor(tree.tokens, device=input_ids.device)
    branches = model.get_input_embeddings()(tokens).expand(rows, -1, -1)
    depth = torch.from_numpy(tree.depth).to(input_ids.device)
    positions = torch.cat(
        [(torch.arange(width, device=input_ids.device)[None] - (width - lengths)[:, None]).clamp(min=0),
         lengths[:, None] + depth[None]], dim=1,
    )  # fmt: skip
    hidden = model.get_decoder()(
        inputs_embeds=torch.cat([prompt, branches.to(prompt)], dim=1),
        attention_mask=tree.mask(lengths, width, prompt.dtype),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, width - 1 :]  # place 0 is the prompt's last token, place n + 1 is node n
    parents = torch.tensor(tree.parents, device=input_ids.device) + 1
    scores = []
    for row in hidden:
        inner, place = parents.unique(return_inverse=True)
        log_probabilities = model.get_output_embeddings()(row[inner]).float().log_softmax(dim=-1)
        node_scores = log_probabilities[place, tokens].cpu().numpy()
        scores.append([float(node_scores[path].sum()) for path in tree.paths])
    return np.array(scores)


def margins(likelihoods: np.ndarray, truths: Sequence[int]) -> np.ndarray:
    """`[B]` log-likelihood of the true answer less that of the best wrong one: positive where the true one wins."""
    rows = np.arange(len(likelihoods))
    others = likelihoods.copy()
    others[rows, truths] = -np.inf
    return likelihoods[rows, truths] - others.max(axis=1)
