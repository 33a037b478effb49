"""One named example for every rule of the scheduler (scheduler/README.md)."""

from __future__ import annotations

from dataclasses import replace

from scheduler.fake_worker import run_alone
from scheduler.prefilling import MAX_JUDGED_ROWS
from scheduler.types import (
    FinishReason,
    Read,
    Sampling,
    StepPlan,
)
from tests.scheduler.worlds import VOCAB, World, make_limits, make_request


def sizes(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [len(span.tokens) for span in plan.spans]


def test_running_decodes_are_never_refused_for_a_prefill_chunk() -> None:
    world = World(make_limits(max_batched_tokens=4, max_seqs=4))
    for number in range(3):
        world.add(make_request(f"d{number}", (number,), max_tokens=30))
    world.step()
    world.add(make_request("long", 60, max_tokens=1))
    for _ in range(10):
        plan = world.step()
        assert sizes(plan) == [1, 1, 1, 1]
        assert [span.read for span in plan.spans[:3]] == [Read.SAMPLE] * 3  # type: ignore[union-attr]
    world.finish()


def test_a_lone_prompt_takes_the_whole_budget() -> None:
    world = World(make_limits(max_batched_tokens=40))
    world.add(make_request("a", 100))
    assert sizes(world.step()) == [40]


def test_a_prompt_takes_at_most_its_share_while_others_wait() -> None:
    world = World(make_limits(max_batched_tokens=64, max_prefill_share=0.5))
    world.add(make_request("a", (1,) * 200, cache_salt="a"))
    world.add(make_request("b", (2,) * 200, cache_salt="b"))
    assert sizes(world.step()) == [32, 32]


def test_what_others_do_not_want_of_a_step_goes_to_the_oldest_prompt() -> None:
    world = World(make_limits(max_batched_tokens=64, max_prefill_share=0.5))
    world.add(make_request("a", (1,) * 200))
    world.add(make_request("b", (2,) * 7))
    assert sizes(world.step()) == [57, 7]


def test_unfinished_prompts_come_before_new_ones() -> None:
    world = World(make_limits(max_batched_tokens=20))
    world.add(make_request("a", (1,) * 30))
    world.step()
    world.add(make_request("b", (2,) * 30))
    plan = world.step()
    assert plan is not None
    assert [span.start for span in plan.spans] == [20, 0]
    assert sizes(plan) == [10, 10]


def test_admission_leaves_the_watermark_free() -> None:
    world = World(make_limits(num_pages=10, watermark_pages=3, max_model_len=40))
    world.add(make_request("a", (1,) * 16, max_tokens=8))
    world.add(make_request("b", (2,) * 16, max_tokens=8))
    plan = world.step()
    assert plan is not None
    assert len(plan.admitted) == 1
    roomy = World(make_limits(num_pages=11, watermark_pages=3, max_model_len=40))
    roomy.add(make_request("a", (1,) * 16, max_tokens=8))
    roomy.add(make_request("b", (2,) * 16, max_tokens=8))
    plan = roomy.step()
    assert plan is not None
    assert len(plan.admitted) == 2


def test_the_watermark_does_not_stop_a_request_that_is_alone() -> None:
    world = World(make_limits(num_pages=10, watermark_pages=9, max_model_len=40))
    world.add(make_request("a", 36, max_tokens=4))
    world.finish()


def test_the_whole_prompt_is_reserved_at_admission() -> None:
    world = World(make_limits(max_batched_tokens=8, page_size=4))
    world.add(make_request("a", 40))
    plan = world.step()
    assert plan is not None
    assert [len(pages) for _, pages in plan.new_pages] == [10]


def test_a_step_preempts_once_and_admits_nobody() -> None:
    world = World(make_limits(num_pages=8, watermark_pages=0, max_model_len=24, max_seqs=4))
    for number in range(4):
        world.add(make_request(f"r{number}", (number,) * 7, max_tokens=16))
    world.step()
    world.add(make_request("late", (9,) * 4, max_tokens=4))
    while not world.stats[-1].num_preempted:
        world.step()
    # Eight pages, four decodes that each want a third one: two must go, in one wave, the youngest first.
    assert world.stats[-1].num_preempted == 2
    assert world.plans[-1].admitted == ()
    assert len(world.plans[-1].spans) == 2
    assert world.stats[-1].num_waiting == 3
    world.finish()


def test_the_lowest_priority_is_preempted_first_then_the_youngest() -> None:
    world = World(make_limits(num_pages=6, watermark_pages=0, max_model_len=24, max_seqs=3))
    world.add(make_request("background", (1,) * 7, max_tokens=16, priority=3))
    world.add(make_request("old", (2,) * 7, max_tokens=16))
    world.add(make_request("young", (3,) * 7, max_tokens=16))
    while not (world.stats and world.stats[-1].num_preempted):
        plan = world.step()
        assert plan is not None
        running = {span.seq_id: world.worker.request_of(span.seq_id).id for span in plan.spans}
    assert "background" not in running.values()
    assert "old" in running.values()
    world.finish()


def test_a_higher_priority_is_admitted_before_an_earlier_arrival() -> None:
    world = World(make_limits(max_seqs=1))
    world.add(make_request("first", (1, 2), priority=1))
    world.add(make_request("urgent", (3, 4), priority=0))
    plan = world.step()
    assert plan is not None
    assert [admission.request.id for admission in plan.admitted] == ["urgent"]


def test_a_preempted_sequence_gives_the_same_text_and_counts_its_recomputed_tokens() -> None:
    world = World(make_limits(num_pages=8, watermark_pages=0, max_model_len=32, enable_prefix_caching=False))
    for number in range(4):
        world.add(make_request(f"r{number}", (number,) * 7, max_tokens=20))
    world.finish()
    recomputed = sum(stats.recomputed_tokens for stats in world.stats)
    prefilled = sum(stats.prefill_tokens for stats in world.stats)
    assert sum(stats.num_preempted for stats in world.stats) > 0
    # What was prefilled is the prompts, what was lost, and the one uncommitted token of each preempted sequence.
    assert prefilled == 4 * 7 + recomputed + sum(stats.num_preempted for stats in world.stats)
    last = [story.deltas[-1].times for story in world.stories.values()]
    assert sum(times.num_preemptions for times in last if times is not None) > 0


def test_siblings_wait_for_the_first_one_and_share_its_pages() -> None:
    world = World(make_limits(max_batched_tokens=64, num_pages=64))
    for sample in range(4):
        sampling = Sampling(seed=1, sample_index=sample)
        world.add(make_request(f"n{sample}", 22, max_tokens=6, sampling=sampling))
    assert sizes(world.step()) == [22]
    plan = world.step()
    assert sizes(plan) == [1, 2, 2, 2]
    assert [stats.prefix_hits for stats in world.stats] == [0, 60]
    assert [stats.prefix_queries for stats in world.stats] == [22, 66]
    world.finish()
    assert [story.deltas[0].cached_tokens for story in world.stories.values()] == [0, 20, 20, 20]


def test_a_deferred_sibling_does_not_hold_up_others() -> None:
    world = World(make_limits(max_batched_tokens=64))
    world.add(make_request("a", (1,) * 40))
    world.add(make_request("sibling", (1,) * 40))
    world.add(make_request("other", (2,) * 8))
    plan = world.step()
    assert plan is not None
    assert [admission.request.id for admission in plan.admitted] == ["a", "other"]
    world.finish()


def test_a_sibling_goes_on_alone_when_the_first_one_is_aborted() -> None:
    world = World(make_limits(max_batched_tokens=8))
    world.add(make_request("a", (1,) * 40))
    world.add(make_request("sibling", (1,) * 40))
    world.step()
    world.step(between=lambda: world.abort("a"))
    assert world.stats[-1].num_running == 0
    plan = world.step()
    assert plan is not None
    assert [admission.request.id for admission in plan.admitted] == ["sibling"]
    # What was committed before the abort is still good; the step it was aborted in is not.
    assert plan.spans[0].start == 8
    world.finish()


def test_an_abort_in_flight_frees_pages_only_after_the_step() -> None:
    world = World(make_limits())
    world.add(make_request("a", 20, max_tokens=9))
    world.step()
    seen: list[int] = []

    def abort() -> None:
        world.abort("a")
        world.scheduler.abort("a")
        seen.append(world.scheduler.stats().pages_used)

    world.step(between=abort)
    assert seen == [6]
    assert world.scheduler.stats().pages_used == 0
    assert len(world.stories["a"].tokens) == 1
    assert world.step() is None


def test_aborting_a_waiting_or_unknown_request_changes_nothing_else() -> None:
    world = World(make_limits(max_seqs=1))
    world.add(make_request("a", 4))
    world.add(make_request("b", 4))
    world.step()
    world.abort("b")
    world.scheduler.abort("nobody")
    assert world.scheduler.stats().num_waiting == 0
    world.finish()


def test_an_id_is_free_again_after_its_request_was_aborted_in_flight() -> None:
    world = World(make_limits())
    world.add(make_request("a", (1,) * 9, max_tokens=9))

    def again() -> None:
        world.abort("a")
        world.add(make_request("a", (5,) * 9, max_tokens=3))

    world.step(between=again)
    world.finish()


def test_a_fully_cached_prompt_still_computes_a_token() -> None:
    world = World(make_limits())
    world.add(make_request("a", 16))
    world.run()
    world.add(make_request("b", 16))
    plan = world.step()
    assert plan is not None
    assert [(span.start, len(span.tokens)) for span in plan.spans] == [(12, 4)]
    world.finish()


def test_output_of_an_earlier_turn_is_found_in_the_cache() -> None:
    world = World(make_limits())
    world.add(make_request("turn1", 10, max_tokens=10))
    world.run()
    history = (*range(1, 11), *world.stories["turn1"].tokens)
    world.add(make_request("turn2", (*history, 3, 4), max_tokens=2))
    world.finish()
    # 19 tokens of the first turn have KV: the last one was never fed back.
    assert world.stories["turn2"].deltas[0].cached_tokens == 16


def test_prefix_pages_are_not_shared_between_salts() -> None:
    world = World(make_limits())
    for salt in ("", "tenant-a", "tenant-b"):
        world.add(make_request(f"r{salt}", 16, cache_salt=salt))
        world.run()
    world.add(make_request("again", 16, cache_salt="tenant-a"))
    world.finish()
    assert [story.deltas[0].cached_tokens for story in world.stories.values()] == [0, 0, 0, 12]


def test_a_prompt_to_be_judged_takes_no_hits_and_gives_each_logprob_once() -> None:
    world = World(make_limits(max_batched_tokens=512, max_model_len=700, num_pages=300))
    prompt = tuple(number % VOCAB for number in range(600))
    world.add(make_request("warm", prompt, max_tokens=1))
    world.run()
    world.add(make_request("judged", prompt, max_tokens=2, sampling=Sampling(prompt_logprobs=1)))
    plan = world.step()
    assert sizes(plan) == [MAX_JUDGED_ROWS]
    world.finish()
    story = world.stories["judged"]
    assert story.deltas[0].cached_tokens == 0
    assert len([entry for delta in story.deltas for entry in delta.prompt_logprobs]) == 599


def test_judged_rows_are_bounded_over_all_requests_of_a_step() -> None:
    world = World(make_limits(max_batched_tokens=512, max_model_len=700, num_pages=600))
    for number in range(3):
        sampling = Sampling(prompt_logprobs=0)
        world.add(make_request(f"j{number}", (number,) * 400, max_tokens=0, sampling=sampling))
    while (plan := world.step()) is not None:
        assert sum(len(span.judged) for span in plan.spans) <= MAX_JUDGED_ROWS + len(plan.spans)
    world.finish()


def test_prompt_logprobs_survive_a_preemption_without_repetition() -> None:
    for seed in range(4):
        world = World(make_limits(num_pages=9, watermark_pages=0, max_model_len=36, max_batched_tokens=8), seed=seed)
        world.add(make_request("decode", (1,) * 7, max_tokens=28 - seed))
        world.step()
        world.add(make_request("judged", (2,) * 26, max_tokens=3, sampling=Sampling(prompt_logprobs=0)))
        world.finish()
        assert len(world.stories["judged"].deltas) > 1


def test_max_tokens_zero_evaluates_the_prompt_and_ends_with_length() -> None:
    world = World(make_limits())
    world.add(make_request("a", 9, max_tokens=0))
    world.add(make_request("b", (7,) * 9, max_tokens=0, sampling=Sampling(prompt_logprobs=0)))
    world.finish()
    assert all(story.tokens == () for story in world.stories.values())
    assert all(story.deltas[-1].finish_reason is FinishReason.LENGTH for story in world.stories.values())


def test_a_resubmitted_request_goes_on_where_it_stopped() -> None:
    limits = make_limits()
    request = make_request("a", 10, max_tokens=12, sampling=Sampling(seed=5))
    text, _, _ = run_alone(request, limits.max_model_len, VOCAB)
    world = World(limits)
    world.add(replace(request, output=text[:5]))
    world.finish()
    assert world.stories["a"].tokens == text[5:]
