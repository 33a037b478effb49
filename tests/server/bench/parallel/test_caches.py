"""The table of caches, on the embedded bidirectional model through the engine; the model itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.bench.parallel.caches import SETTINGS, Setting, draw, measure, table
from server.embedded import tasks
from server.engine.offline import Engine, GenerationError
from server.models.locate import resolve_model


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("braid-tiny-bidirectional", dtype="float32", max_seqs=16) as engine:
        yield engine


def test_every_setting_has_its_base_line_before_it() -> None:
    for place, setting in enumerate(SETTINGS):
        assert setting.base in SETTINGS[: place + 1]


def test_caches_take_fewer_rows_and_the_base_line_is_mostly_right(engine: Engine) -> None:
    slow = Setting("none", "low_confidence")
    settings = [slow, slow._replace(cache="dual"), slow._replace(cache="dkv_decode", values=(("refresh", 1),))]
    base, dual, fresh = measure(engine, draw(5, 3), settings, 16)
    assert base.num_right / base.num_examples > 0.6, "the embedded model has lost its tasks"
    assert (base.num_same, base.usage.commit_passes) == (base.num_examples, 0)
    assert dual.usage.rows < base.usage.rows / 1.5
    assert (fresh.usage, fresh.num_same) == (base.usage, base.num_examples), "a refresh in every step is no cache"
    assert table([base, dual]).count("\n") == 3


def test_the_model_denoises_where_nothing_is_asked(engine: Engine) -> None:
    example = tasks.Example("copy", "copy: 3 1 2 ->", " 3 1 2\n")
    (completion,) = engine.generate([example.prompt], 16)
    assert tasks.check(example, completion.text)
    assert completion.decoding is not None
    assert completion.decoding.forwards >= 1
    with pytest.raises((ValueError, GenerationError), match="only denoise"):
        engine.generate([example.prompt], 16, decoding="autoregressive")


def test_the_checkpoint_is_small() -> None:
    folder = resolve_model("braid-tiny-bidirectional")
    assert (folder / "model.safetensors").stat().st_size <= 1_500_000
