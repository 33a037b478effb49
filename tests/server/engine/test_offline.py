"""Engine in-process on a tiny checkpoint: what `Engine(...)` promises, and that batching changes no text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.types import FinishReason, Speculation, SpeculationMode, VerifyMode
from server.engine.config import EngineConfig, SpeculationConfig
from server.engine.offline import Engine, GenerationError
from tests.tiny import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    with Engine(str(folder), dtype="float32", num_threads=1, max_seqs=8, warm_up=False) as engine:
        yield engine


def test_a_batch_gives_what_each_prompt_gives_alone(engine: Engine) -> None:
    prompts = [f"prompt number {i} " * (1 + i % 3) for i in range(12)]
    together = engine.generate(prompts, max_tokens=12, stop_ids=(), temperature=0.9, seed=5)
    alone = [engine.generate([prompt], max_tokens=12, stop_ids=(), temperature=0.9, seed=5)[0] for prompt in prompts]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert all(len(one.tokens) == 12 and one.finish_reason is FinishReason.LENGTH for one in together)


def test_each_prompt_can_have_its_own_seed(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "stop_ids": (), "temperature": 1.0}
    together = engine.generate(["the same"] * 3, seeds=[7, 8, 7], **options)
    alone = [engine.generate(["the same"], seed=seed, **options)[0] for seed in (7, 8)]
    assert [one.tokens for one in together] == [alone[0].tokens, alone[1].tokens, alone[0].tokens]
    assert alone[0].tokens != alone[1].tokens


@pytest.mark.parametrize("wrong", [{"seeds": [1]}, {"seeds": [1, 2], "seed": 3}])
def test_seeds_are_one_for_each_prompt(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one for each prompt"):
        engine.generate(["a", "b"], **wrong)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Speculation(drafter="eagle"), "speculation.drafter is eagle, but this server has prediction, grammar"),
        (Speculation(max_tokens=9), "speculation.max_tokens is 9, but must be between 1 and 8"),
        (Speculation(tree=True, verify=VerifyMode.BLOCK), "trees are verified coupled only"),
        (Speculation(drafter="suffix", prediction=(1,)), "speculation.drafter is suffix, which does not read it"),
    ],
)
def test_speculation_that_cannot_be_had_is_refused(engine: Engine, asked: Speculation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(["hello"], speculation=asked)


def test_an_engine_of_a_script_has_one_model() -> None:
    with pytest.raises(ValueError, match="make an Engine for each"):
        Engine("braid-tiny", also=(EngineConfig(name="b"),))


def test_synthetic_drafts_are_right_as_often_as_asked_and_change_no_token() -> None:
    shape = "hidden=64,layers=2,heads=4,kv_heads=2,mlp=128,vocab=4096"
    config = SpeculationConfig(synthetic_acceptance=0.8, max_drafts=4)
    prompts = [[5 + i] * 20 + [i] for i in range(8)]
    options: dict[str, Any] = {"max_tokens": 100, "stop_ids": (), "speculation": Speculation(SpeculationMode.ON)}
    with Engine(random_weights=shape, dtype="float32", num_threads=1, speculation=config) as engine:
        first, again = (engine.generate(prompts, **options) for _ in range(2))
    assert [one.tokens for one in first] == [one.tokens for one in again]
    assert not any(one.speculation.drafted for one in first)
    accepted, steps = (sum(getattr(one.speculation, name) for one in again) for name in ("accepted", "steps"))
    assert 1 + accepted / steps == pytest.approx(sum(0.8**i for i in range(5)), rel=0.1)


def test_a_stream_is_the_completion_in_pieces(engine: Engine) -> None:
    whole = engine.generate(["hello"], max_tokens=20, stop_ids=())[0]
    pieces = list(engine.stream("hello", max_tokens=20, stop_ids=()))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    text = engine.generate(["hello"], max_tokens=30, stop_ids=())[0].text
    stop = text[5:8]
    stopped = engine.generate(["hello"], max_tokens=30, stop=[stop], stop_ids=())[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
    assert len(stopped.tokens) < 30


def test_a_stop_id_is_a_token_without_text(engine: Engine) -> None:
    free = engine.generate(["hello"], max_tokens=10, stop_ids=())[0]
    stopped = engine.generate(["hello"], max_tokens=10, stop_ids=(free.tokens[4],))[0]
    cut = free.tokens.index(free.tokens[4]) + 1
    assert stopped.tokens == free.tokens[:cut]
    assert stopped.finish_reason is FinishReason.STOP
    assert free.text.startswith(stopped.text)


def test_logprobs_come_one_per_token(engine: Engine) -> None:
    result = engine.generate(["hello world"], max_tokens=5, stop_ids=(), logprobs=2, prompt_logprobs=1)[0]
    assert [entry.token for entry in result.logprobs] == list(result.tokens)
    assert len(result.prompt_logprobs) == len(engine.tokenizer.encode("hello world")) - 1


def test_closing_a_stream_frees_its_pages(engine: Engine) -> None:
    stream = engine.stream("hello", max_tokens=100, stop_ids=())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.generate(["again"], max_tokens=2, stop_ids=())[0].tokens
    assert engine._core.stats().pages_used == 0


def test_what_cannot_run_is_refused_with_a_reason(engine: Engine) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate([[]])
    with pytest.raises(ValueError, match="token id 99999 is not in"):
        engine.generate([[99999]])
    with pytest.raises(GenerationError):
        engine.generate([[5] * 600], max_tokens=600)
    with pytest.raises(TypeError):
        engine.generate("hello")
    assert not engine._core.has_work


def test_the_offline_engine_loads_no_http_package() -> None:
    code = (
        "import server.engine.offline, sys; print([m for m in ('fastapi', 'uvicorn', 'pydantic') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
