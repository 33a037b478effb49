"""What must hold between any two calls of the scheduler, checked from scratch. Tests call it after every step."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

from scheduler.kv_memory import KVMemory
from scheduler.sequence import Sequence, Status


def check_queues(
    by_id: Mapping[str, Sequence],
    running: Many[Sequence],
    waiting: Many[Sequence],
    ended: Many[Sequence],
    num_queued_tokens: int,
) -> None:
    """Each request is in exactly one queue, each queue is in order, and the counters are true."""
    alive = [seq for seq in running if seq.status is Status.RUNNING]
    assert all(seq.status is Status.WAITING for seq in waiting), "a sequence in the queue is not waiting"
    assert {id(seq) for seq in running} == {id(seq) for seq in [*alive, *ended]}, "an ended sequence is still running"
    assert sorted(by_id) == sorted(seq.request.id for seq in [*alive, *waiting]), "a request is in no queue, or in two"
    for queue in (running, waiting):
        orders = [seq.order for seq in queue]
        assert orders == sorted(set(orders)), "a queue is out of order"
    assert num_queued_tokens == sum(len(seq.tokens) for seq in waiting), "the count of queued tokens is wrong"
    for seq in waiting:
        assert (seq.pages, seq.num_committed, seq.seq_id) == ([], 0, 0), "a waiting sequence owns KV"
    for seq in [*alive, *waiting]:
        assert len(seq.tokens) - len(seq.request.prompt) <= max(seq.request.max_tokens, 0), "output beyond max_tokens"
    ids = [seq.seq_id for seq in running]
    assert len(set(ids)) == len(ids), "two running sequences have one seq_id"


def check_memory(memory: KVMemory, running: Many[Sequence]) -> None:
    """R2: every page is accounted for and shared pages are never written. R3: only committed KV is indexed."""
    memory.pool.check([seq.pages for seq in running])
    memory.index.check()
    indexed = memory.index.indexed_pages()
    size = memory.page_size
    for seq in running:
        assert seq.num_committed <= len(seq.pages) * size, "committed tokens have no page"
        assert seq.num_committed <= len(seq.tokens), "more tokens are committed than known"
        names: list[bytes] = []
        memory.name_pages(seq, names, seq.tokens)
        for number, page in enumerate(seq.pages):
            is_committed = (number + 1) * size <= seq.num_committed
            if memory.pool.num_owners(page) > 1:
                assert is_committed, f"page {page} is shared, and its next writer would change another's KV (R2)"
            if page in indexed:
                assert is_committed, f"page {page} is indexed before its KV is committed (R3)"
                assert memory.index.name_of(page) == names[number], f"page {page} is indexed under a wrong name"
    owned = {page for seq in running for page in seq.pages}
    unowned = indexed - owned
    assert len(unowned) == memory.pool.num_idle, "an idle page is not indexed, or an indexed one is free"
    announced = {name for seq in running for name in seq.page_names[seq.num_entered : seq.num_announced]}
    assert memory.index.pending_names() <= announced, "a page is announced that nobody computes"
