"""The parallel benchmark without an engine: cases, sweeps, scores, statements; theory holds for a perfect decoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from scheduler.types import DiffusionModel, Snapshot, Topology
from server.bench.client import BenchError
from server.bench.parallel.cases import DETERMINISTIC, RANDOM, TASKS, Case, make_cases
from server.bench.parallel.decoder import plain_name, steps_of
from server.bench.parallel.measure import Answer, Figures, Theory, item_steps, summarise, theory_of
from server.bench.parallel.picture import draw
from server.bench.parallel.report import Total, as_table, comparisons, totals, verdicts, write_json
from server.bench.parallel.run import measure, read_tasks
from server.bench.parallel.sweep import SWEEPS, Setting, read_settings
from tests.server.bench.parallel.perfect import PerfectDecoder

MODEL = DiffusionModel(mask_id=3, block_size=8, is_dual=True)


def one_each(text: str) -> int:
    return 1


def cases(*tasks: str, count: int = 40) -> dict[str, list[Case]]:
    return {task: make_cases(task, count, 0, one_each) for task in tasks}


@pytest.mark.parametrize("task", TASKS)
def test_cases_are_lists_of_different_items_of_each_length_in_turn(task: str) -> None:
    found = make_cases(task, 8, 0, one_each)
    assert [len(case.items) for case in found] == [3, 4, 5, 6] * 2
    for case in found:
        words = case.example.answer.split()
        assert case.answer_len == len(words)
        assert len(set(words)) == len(words)
        assert set(words) - set(case.items) <= {case.new}
        assert bool(case.new) == task.startswith(("insert", "replace"))
        assert case.is_right(case.example.answer)
        assert not case.is_right(f"{case.example.answer} 1")
    assert found == make_cases(task, 8, 0, one_each)
    assert found != make_cases(task, 8, 1, one_each)
    assert len({case.seed for case in found}) == len(found)


def test_items_are_single_tokens() -> None:
    found = make_cases("copy", 12, 0, lambda text: 1 if text.strip().isdigit() and len(text) == 2 else 2)
    assert all(item.isdigit() and len(item) == 1 for case in found for item in case.items)
    with pytest.raises(BenchError, match="tokenizer of the embedded models"):
        make_cases("copy", 1, 0, lambda text: 2)


def test_every_policy_of_the_topology_is_measured_and_what_others_are_compared_with_comes_first() -> None:
    settings = read_settings([], MODEL)
    assert [setting.label for setting in settings[:2]] == ["autoregressive", "sequential"]
    labels = [setting.label for setting in settings]
    assert len(set(labels)) == len(labels)
    assert {"threshold 0.9", "random steps=2", "llada2"} <= set(labels)
    assert not {"dual", "prefix", "elastic"} & {setting.policy for setting in settings}
    assert "sdar_dynamic" not in {
        setting.policy for setting in read_settings([], DiffusionModel(3, 8, Topology.BIDIRECTIONAL))
    }
    assert set(SWEEPS) <= {setting.policy for setting in settings}, "every sweep is one of the catalogue"


def test_steps_reach_the_request() -> None:
    settings = read_settings(["random:8,3,1"], MODEL)[2:]
    assert [setting.decoding.steps for setting in settings if setting.decoding] == [8, 3, 1]


def test_a_swept_value_reaches_its_parameter() -> None:
    (setting,) = read_settings(["adablock:0.75"], MODEL)[2:]
    assert setting.decoding is not None
    assert (setting.decoding.selector["threshold"], setting.decoding.planner["threshold"]) == (0.75, 0.3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("fastest", "policy is fastest"),
        ("sequential:3", "swept over nothing"),
        ("threshold:x", "not like threshold"),
        ("threshold:7", "threshold is 7"),
        ("random:0", "whole numbers"),
        ("dual", "for bidirectional models"),
    ],
)
def test_what_cannot_be_had_is_refused(asked: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_settings([asked], MODEL)


def test_tasks_are_named_one_by_one_or_by_kind() -> None:
    assert read_tasks([]) == list(TASKS)
    assert read_tasks(["random", "copy", "shuffle"]) == [*RANDOM, "copy"]
    with pytest.raises(BenchError, match="none of deterministic"):
        read_tasks(["sorting"])


def test_steps_are_read_off_the_blocks_as_they_stood() -> None:
    """A prompt of 6, blocks of 4: its block has two masks, then a block that changes its mind about position 8."""
    snapshots = [
        Snapshot(4, (50, 51, 3, 60), 1),
        Snapshot(4, (50, 51, 61, 60), 2),
        Snapshot(8, (70, 3, 71, 3), 1),
        Snapshot(8, (70, 3, 71, 3), 2),
        Snapshot(8, (72, 73, 71, 74), 3),
    ]
    assert steps_of(snapshots, 6, 3) == ((1,), (0,), (4,), (2, 3, 5))


def test_items_that_were_never_fixed_count_as_fixed_one_by_one() -> None:
    assert item_steps(((3, 0), (5, 1), (6,)), 4) == [(0, 3), (1,), (2,)]


def test_theory_depends_on_what_the_choice_of_positions_looks_at() -> None:
    names = ("sequential", "random:2", "entropy:2", "dparallel:0.5", "threshold:0.9", "low_confidence:2", "prophet:5")
    found = [theory_of(read_settings([name], MODEL)[-1]) for name in names]
    assert found == [Theory.CLOSED] * 2 + [Theory.FOLLOWED] * 2 + [Theory.BLIND] * 3
    assert theory_of(read_settings(["wino:0.7"], MODEL)[-1]) is None
    assert theory_of(read_settings([], MODEL)[0]) is None


def test_an_answer_is_scored_and_its_forwards_are_counted() -> None:
    (case, other) = make_cases("replace-random", 2, 0, one_each)
    words = (*(f" {item}" for item in (case.new, *case.items[1:])), "\n", "")
    right = Answer("".join(words), words, 3, 1, ((0, 1, 2), (3,), (4,)))
    wrong = Answer(" ?\n", (" ?", "\n", ""), 2, 0, ((0, 1, 2), (3,)))
    (setting,) = read_settings(["random:3"], MODEL)[2:]
    figures = summarise(setting, [case, other], [right, wrong])
    assert (figures.cases, figures.right, figures.tokens, figures.forwards, figures.commit_passes) == (2, 1, 8, 5, 1)
    # Three at once of three items, then three at once and one of four items.
    last = (3 / 4) * (9 / 16) + (27 / 64)
    assert figures.expected == pytest.approx((4 / 9 + last) / 2)
    assert figures.variance == pytest.approx(4 / 9 * 5 / 9 + last * (1 - last))
    assert summarise(setting, make_cases("copy", 1, 0, one_each), [right]).expected is None


@pytest.mark.parametrize("slip", [0.0, 0.2])
def test_a_perfect_sampler_is_within_three_sigma_whatever_its_model_slips(slip: float) -> None:
    settings = read_settings(["random:2,4,8", "entropy:2,4"], MODEL)
    figures, refused = measure(PerfectDecoder(slip), settings, cases(*RANDOM, count=300), True, is_quiet=True)
    found = comparisons(figures)
    assert not refused
    assert len(found) == 5 * len(RANDOM)
    assert all(c.is_within for c in found), [(c.figures.setting, c.figures.task, c.z) for c in found if not c.is_within]
    assert min(c.predicted for c in found) < 0.1, "there was something to predict"
    assert max(3 * c.sigma for c in found) < 0.15, "and the band is narrow"


def test_theory_is_scaled_by_what_the_model_does_one_by_one_in_the_same_order() -> None:
    """A model that slips in random order alone is a worse model there; its sampler is none the worse."""

    class SlipsInRandomOrder(PerfectDecoder):
        def _answer(self, case: Case, setting: Setting) -> Answer:
            self.slip = 0.3 if setting.policy == "random" else 0.0
            return super()._answer(case, setting)

    task = cases("remove-random", count=400)
    alone, _ = measure(SlipsInRandomOrder(), read_settings(["random:1,2"], MODEL), task, True, is_quiet=True)
    (found,) = comparisons(alone)
    assert found.own < 0.8
    assert found.is_within
    # Left to right says nothing of that.
    without, _ = measure(SlipsInRandomOrder(), read_settings(["random:2"], MODEL), task, True, is_quiet=True)
    (found,) = comparisons(without)
    assert found.own == 1.0
    assert not found.is_within


def test_a_sampler_that_ignores_what_is_fixed_is_outside() -> None:
    """It says that it fixed items two by two, but drew four at once."""
    settings = read_settings(["random:1,2"], MODEL)

    def claims(setting: Setting, length: int) -> list[tuple[int, ...]]:
        k = 4 if setting.value == 2 else 1
        return [tuple(range(i, min(i + k, length))) for i in range(0, length, k)]

    class Liar(PerfectDecoder):
        def _answer(self, case: Case, setting: Setting) -> Answer:
            answer = super()._answer(case, setting)
            if setting.value != 2:
                return answer
            pairs = [tuple(range(i, min(i + 2, case.answer_len))) for i in range(0, case.answer_len, 2)]
            return dataclasses.replace(answer, steps=tuple(pairs))

    figures, _ = measure(Liar(steps=claims), settings, cases("shuffle", count=200), True, is_quiet=True)
    (found,) = comparisons(figures)
    assert not found.is_within
    assert found.z < -3
    (verdict,) = verdicts(figures)
    assert not verdict.holds
    assert "random steps=2 shuffle" in str(verdict)


def test_a_model_that_has_not_learnt_a_task_shows_nothing_about_the_sampler() -> None:
    settings = read_settings(["random:4"], MODEL)
    figures, _ = measure(PerfectDecoder(0.6), settings, cases("shuffle", "remove-random"), True, is_quiet=True)
    assert all(c.is_within and not c.is_telling for c in comparisons(figures))
    (verdict,) = verdicts(figures)
    assert not verdict.holds
    assert "0 of 0; untested, right too seldom with one token a step: shuffle" in verdict.text
    assert as_table(figures).count("tells nothing") == 2


def figures_of(policy: str, value: float | None, task: str, right: int, forwards: int) -> Figures:
    label = policy if value is None else f"{policy} {value:g}"
    return Figures(policy, label, value, task, 100, right, 700, forwards, 10)


def test_totals_weigh_tasks_alike_and_sum_forwards() -> None:
    found = totals(
        [figures_of("auto", None, "copy", 100, 100), figures_of("auto", None, "sort", 50, 300)], ["copy", "sort"]
    )
    assert found == [Total("auto", "auto", 0.75, 1400 / 400, 1400 / 420)]


def test_the_statements_name_what_holds_and_what_does_not() -> None:
    base = [figures_of("autoregressive", None, task, 99, 700) for task in DETERMINISTIC]
    base += [figures_of("sequential", None, task, 98, 700) for task in DETERMINISTIC]
    fast = [figures_of("threshold", 0.9, task, 97, 200) for task in DETERMINISTIC]
    faster = [figures_of("threshold", 0.5, task, 90, 100) for task in DETERMINISTIC]
    slow = [figures_of("factor", 1, task, 98, 400) for task in DETERMINISTIC]
    good = verdicts([*base, *fast, *faster, *slow])
    assert [verdict.holds for verdict in good] == [True, True]
    assert "copy 98.0% (99.0%)" in good[0].text
    assert good[1].text.endswith(": threshold 0.9 3.50"), "neither what loses too much nor what is too slow"
    bad = verdicts([*base, *faster, *slow, figures_of("sequential", None, "copy", 80, 700)])
    assert [verdict.holds for verdict in bad] == [False, False]
    assert "none; the fastest are factor 1 1.75" in bad[1].text


def test_tables_json_and_picture_show_every_setting(tmp_path: Path) -> None:
    settings = read_settings(["random:2,8", "threshold:0.9"], MODEL)
    figures, _ = measure(PerfectDecoder(), settings, cases(*TASKS, count=8), True, is_quiet=True)
    table = as_table(figures)
    for setting in settings:
        assert table.count(f"\n{setting.label:<24}") >= 2
    assert "closed form" in table
    write_json(tmp_path / "deep" / "p.json", figures, {"cases": 8})
    content = json.loads((tmp_path / "deep" / "p.json").read_text())
    assert len(content["figures"]) == len(settings) * len(TASKS)
    assert [verdict["holds"] for verdict in content["verdicts"]] == [verdict.holds for verdict in verdicts(figures)]
    draw(tmp_path / "deep" / "p.png", figures, "perfect")
    assert (tmp_path / "deep" / "p.png").stat().st_size > 10_000


def test_what_the_engine_refuses_is_an_error_only_where_it_was_asked_for() -> None:
    decoder, settings = PerfectDecoder(refuses="learn2pd"), read_settings(["learn2pd:0.5", "random:2"], MODEL)
    figures, refused = measure(decoder, settings, cases("copy", "shuffle", count=4), False, is_quiet=True)
    assert refused == ["learn2pd 0.5: no such file"]
    assert "random steps=2" in {one.setting for one in figures}
    with pytest.raises(BenchError, match="no such file"):
        measure(decoder, settings, cases("copy", count=4), True, is_quiet=True)


def test_a_models_second_name_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain_name("braid-tiny-diffusion") == plain_name("braid-tiny") == "braid-tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-diffusion").mkdir()
    assert plain_name("my-diffusion") == "my-diffusion"
