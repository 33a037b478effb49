"""The command against the engine: a few cases of the embedded model, from flags to tables, JSON and exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bench.cli import main
from server.bench.client import BenchError
from server.bench.parallel.cases import make_cases
from server.bench.parallel.decoder import Decoder
from server.bench.parallel.sweep import read_settings
from tests.tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder("braid-tiny", max_seqs=16) as decoder:
        yield decoder


@pytest.mark.parametrize("task", ["copy", "shuffle"])
def test_steps_cover_the_answer_once_and_are_as_many_as_the_forwards(decoder: Decoder, task: str) -> None:
    cases = make_cases(task, 8, 0, decoder.num_tokens)
    for setting in read_settings(["random:4", "threshold:0.5"], decoder.diffusion)[1:]:
        for answer in decoder.answer(cases, setting):
            fixed = [offset for step in answer.steps for offset in step]
            assert len(set(fixed)) == len(fixed)
            assert set(range(len(answer.words))) <= set(fixed), "every token of the answer was fixed in some step"
            assert 0 < len(answer.steps) <= answer.forwards
            assert answer.text.strip().split() == "".join(answer.words).replace("<|endoftext|>", "").split()
            if setting.policy == "sequential":
                assert all(len(step) == 1 for step in answer.steps)
                assert fixed == sorted(fixed)


def test_answers_are_a_function_of_the_case_and_its_crowd_does_not_matter(decoder: Decoder) -> None:
    cases = make_cases("shuffle", 6, 0, decoder.num_tokens)
    (setting,) = read_settings(["random:2"], decoder.diffusion)[2:]
    together = decoder.answer(cases, setting)
    assert together == [decoder.answer([case], setting)[0] for case in cases]


def test_the_command_reports_every_setting_and_says_what_was_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png"), "--no-progress"]
    policies = ["--policies", "threshold:0.5", "random:2", "--tasks", "copy", "replace-random"]
    assert main(["parallel", "--cases", "6", *policies, *files]) == 0
    out = capsys.readouterr().out
    assert "shown: deterministic tasks at least 97%" in out, "the embedded model copies"
    assert "random tasks within 3 sigma of theory" in out
    content = json.loads((tmp_path / "p.json").read_text())
    by_key = {(one["setting"], one["task"]): one for one in content["figures"]}
    assert {setting for setting, _ in by_key} == {"autoregressive", "sequential", "threshold 0.5", "random steps=2"}
    assert by_key["sequential", "copy"]["tokens"] == by_key["sequential", "copy"]["forwards"]
    assert by_key["threshold 0.5", "copy"]["forwards"] < by_key["sequential", "copy"]["forwards"] / 2
    assert by_key["sequential", "replace-random"]["expected"] == pytest.approx(1)
    assert by_key["random steps=2", "replace-random"]["expected"] < 1
    assert (tmp_path / "p.png").exists()


def test_a_model_that_cannot_denoise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="does not denoise"):
        Decoder(str(write_tiny_checkpoint(tmp_path / "tiny")))
    with pytest.raises(BenchError, match="neither a folder here"):
        Decoder("no/such/model")
