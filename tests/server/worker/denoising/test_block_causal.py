"""Block-causal requests through `Worker.run` against the plain loops of the oracle, token for token."""

from __future__ import annotations

import pytest

from scheduler.policies import make_diffusion
from scheduler.types import DiffusionModel, Request, Sampling, Topology
from tests.server.worker.denoising.block_driver import BlockDriver
from tests.server.worker.denoising.oracle import Rule, above, generate, leftmost, low_confidence, static
from tests.server.worker.tiny_model import TinyModel, make_worker

VOCAB, MASK, SIZE = 40, 39, 4
MODEL = DiffusionModel(MASK, SIZE)
RULES: dict[str, tuple[str, dict[str, float], int | None, Rule]] = {
    "sequential": ("sequential", {}, None, leftmost),
    "low_confidence": ("low_confidence", {}, None, low_confidence),
    "static": ("low_confidence", {}, 2, static(2)),
    "threshold": ("threshold", {"threshold": 0.3}, None, above(0.3)),
    "all": ("threshold", {"threshold": 0.0}, None, above(0.0)),
}


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB, sharpness=6.0)


def request(
    name: str,
    policy: str,
    values: dict[str, float] | None = None,
    length: int = 11,
    max_tokens: int = 13,
    steps: int | None = None,
    **sampling: object,
) -> Request:
    prompt = tuple(3 + (7 * i + len(name) + ord(name[-1])) % (VOCAB - 4) for i in range(length))
    decoding = make_diffusion(policy, Topology.BLOCK_CAUSAL, values=values, steps=steps)
    chosen = Sampling(**{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return Request(name, prompt, max_tokens, chosen, decoding=decoding)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("rule", RULES)
def test_text_equals_the_plain_loop(model: TinyModel, rule: str, length: int, fused: bool) -> None:
    policy, values, steps, plain = RULES[rule]
    asked = request(rule, policy, values, length, steps=steps, logprobs=0)
    driver = BlockDriver(make_worker(model, diffusion=MODEL), fused, twice=True)
    (one,) = driver.generate([asked])
    expected = generate(model, asked, SIZE, MASK, plain)
    assert driver.output(one) == expected.tokens
    assert one.fixed == expected.fixed
    assert one.logprobs == {at: pytest.approx(value, abs=1e-4) for at, value in expected.logprobs.items()}
