"""Routing, and the batched computation against one cloud and one expert at a time."""

import pytest
import torch
from conftest import tiny_model

from pointalign.models.point_encoder import QueryExperts

TOKENS = torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(0))


def experts(routing, top_k=2):
    torch.manual_seed(1)
    made = QueryExperts(torch.zeros(1, 4, 16), 6, 16, routing, top_k)
    torch.nn.init.normal_(made.queries)
    for one in made.router.parameters():
        torch.nn.init.normal_(one, std=0.1)
    return made


@pytest.mark.parametrize("routing", ["sparse", "soft", "constant"])
def test_batched_equals_one_expert_at_a_time(routing):
    model = tiny_model().model
    model.add_query_experts(6, routing)
    model.query_experts.load_state_dict(experts(routing).state_dict())
    model.eval()
    with torch.no_grad():
        found = model.query(TOKENS)
        keys = model.point_mlp(TOKENS)
        for cloud in range(len(TOKENS)):
            seen = torch.cat([TOKENS[cloud, 0], TOKENS[cloud, 1:].max(0).values])
            share = torch.softmax(model.query_experts.router(seen), 0)
            if routing == "sparse":
                lowest = share.sort(descending=True).values[1]
                share = torch.where(share >= lowest, share, 0.0)  # not renormalised
                assert share.sum() < 0.95
            elif routing == "constant":
                share = torch.full((6,), 1 / 6)
            wanted = sum(
                share[i]
                * model.qformer(
                    query_embeds=model.query_experts.queries[i][None], encoder_hidden_states=keys[cloud][None]
                ).last_hidden_state[0]
                for i in range(6)
            )
            torch.testing.assert_close(found[cloud], wanted, atol=1e-5, rtol=1e-5)


def test_experts_start_from_the_queries_they_replace():
    model = tiny_model()
    queries = model.model.query_tokens.detach().clone()
    model.model.add_query_experts(3, "soft")
    assert torch.equal(model.model.query_experts.queries, queries.expand(3, -1, -1))
    assert model.model.query_tokens is None and model.config.num_query_experts == 3
    again = type(model)(model.config)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_bad_routings_are_named():
    with pytest.raises(ValueError, match="expected one of sparse, soft, constant"):
        QueryExperts(torch.zeros(1, 2, 4), 3, 4, "dense")
    with pytest.raises(ValueError, match="expected 1 to 3"):
        QueryExperts(torch.zeros(1, 2, 4), 3, 4, "sparse", 4)
