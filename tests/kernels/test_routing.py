"""The choice of experts against its definition, row by row in Python floats; and that a row chooses for itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.routing import Router, choose_experts


def by_definition(logits: list[float], router: Router) -> dict[int, float]:
    """Weight of each chosen expert."""
    if router.is_sigmoid:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
    bias = [0.0] * len(logits) if router.bias_E is None else router.bias_E.tolist()
    ranks = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // router.num_groups

    def group_score(group: int) -> float:
        return math.fsum(sorted(ranks[group * size : (group + 1) * size])[-2:])

    groups = sorted(range(router.num_groups), key=group_score)[-router.top_groups :]
    allowed = [expert for group in groups for expert in range(group * size, (group + 1) * size)]
    chosen = sorted(allowed, key=lambda expert: ranks[expert])[-router.top_k :]
    total = sum(scores[expert] for expert in chosen) if router.norm_topk_prob else 1.0
    return {expert: scores[expert] / total * router.scale for expert in chosen}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROUTERS = {
    "softmax": Router(3, norm_topk_prob=False),
    "softmax-normalised": Router(3, norm_topk_prob=True),
    "sigmoid": Router(3, norm_topk_prob=True, is_sigmoid=True),
    "one expert": Router(1, norm_topk_prob=False, is_sigmoid=True, bias_E=random(12, seed=3), scale=2.5),
    "biased": Router(3, norm_topk_prob=True, is_sigmoid=True, bias_E=random(12, seed=3), scale=2.5),
    "groups": Router(4, True, is_sigmoid=True, bias_E=random(12, seed=4) * 0.2, num_groups=4, top_groups=2, scale=2.5),
    "all groups": Router(4, True, is_sigmoid=True, bias_E=random(12, seed=4), num_groups=4, top_groups=4),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_and_weights_are_those_of_the_definition(name: str) -> None:
    router, logits = ROUTERS[name], random(40, 12) * 2
    weights, experts = choose_experts(logits, router)
    assert weights.shape == experts.shape == (40, router.top_k)
    for row in range(40):
        expected = by_definition(logits[row].tolist(), router)
        found = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


def test_groups_and_bias_change_the_choice() -> None:
    """Else the test above could pass without either."""
    logits = random(40, 12) * 2
    chosen = {name: choose_experts(logits, ROUTERS[name])[1][:, :3] for name in ("sigmoid", "biased", "groups")}
    assert not torch.equal(chosen["sigmoid"], chosen["biased"])
    free = choose_experts(logits, Router(4, True, is_sigmoid=True, bias_E=ROUTERS["groups"].bias_E, scale=2.5))[1]
    assert not torch.equal(chosen["groups"], free[:, :3])


def test_sigmoids_of_next_to_nothing_give_finite_weights() -> None:
    weights, _ = choose_experts(torch.full((1, 4), -200.0), Router(2, True, is_sigmoid=True))
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("num_experts", [6, 12, 33, 256])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_rows_choice_is_the_same_bits_in_any_company(num_experts: int, top_k: int) -> None:
    logits = random(67, num_experts) * 3
    router = Router(top_k, True, is_sigmoid=True, bias_E=random(num_experts, seed=2), num_groups=3, top_groups=2)
    if num_experts % 3:
        router = Router(top_k, True, is_sigmoid=True, bias_E=random(num_experts, seed=2))
    for kind in (router, Router(top_k, True)):
        together = choose_experts(logits, kind)
        for row in (0, 1, 40, 66):
            alone = choose_experts(logits[row : row + 1], kind)
            assert torch.equal(alone[0], together[0][row : row + 1])
            assert torch.equal(alone[1], together[1][row : row + 1])
