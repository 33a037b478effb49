"""Where each sequence is (waiting, running, ended), and what moving it means for its pages. Decides nothing."""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from scheduler import invariants
from scheduler.kv_memory import KVMemory
from scheduler.sequence import Sequence, Status

_ORDER = attrgetter("order")


class Queues:
    """All sequences of a scheduler, by id and in order of service.

    running    admitted sequences, and those that ended until the last step they are in is over
    waiting    sequences without KV
    num_denoisers   of the running ones, those that denoise, or will
    """

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self.by_id: dict[str, Sequence] = {}
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_queued_tokens = 0
        self.num_denoisers = 0
        self._ended: list[Sequence] = []
        self._released: list[int] = []
        self._last_seq_id = 0

    @property
    def num_running(self) -> int:
        return len(self.running) - len(self._ended)

    def enqueue(self, seq: Sequence, now: float) -> None:
        seq.status = Status.WAITING
        seq.seq_id = 0
        seq.waiting_since_s = now
        insort(self.waiting, seq, key=_ORDER)
        self.num_queued_tokens += len(seq.tokens)

    def admit(self, seq: Sequence, hits: list[int]) -> None:
        """Move a waiting sequence to the running ones, under a new seq_id, with pages up to its reach."""
        self.waiting.remove(seq)
        self.num_queued_tokens -= len(seq.tokens)
        self._last_seq_id += 1
        seq.seq_id = self._last_seq_id
        seq.status = Status.RUNNING
        seq.prefill_end = seq.decoding.prompt_end
        self.num_denoisers += seq.decoding.is_denoiser
        self._memory.reserve(seq, hits)
        insort(self.running, seq, key=_ORDER)

    def preempt_last(self, now: float) -> None:
        """The last running sequence loses its pages and waits again, in its old place in the order."""
        seq = self.running.pop()
        self.num_denoisers -= seq.decoding.is_denoiser
        seq.high_water = max(seq.high_water, seq.num_committed)
        self._memory.drop(seq)
        self._released.append(seq.seq_id)
        seq.decoding.restart()
        seq.num_preemptions += 1
        self.enqueue(seq, now)

    def end(self, seq: Sequence, last_step: int) -> None:
        """Forget a request. If it was running its pages stay its own until `last_step` is over: the worker may be
        writing them."""
        del self.by_id[seq.request.id]
        if seq.status is Status.WAITING:
            self.waiting.remove(seq)
            self.num_queued_tokens -= len(seq.tokens)
        else:
            self._ended.append(seq)
            seq.last_step = last_step
        seq.status = Status.FINISHED

    def bury(self, step: int) -> None:
        """Free the pages of sequences that ended and whose last step is over, now that `step` is."""
        if not self._ended:
            return
        gone = {seq for seq in self._ended if seq.last_step <= step}
        for seq in self._ended:
            if seq in gone:
                self._memory.drop(seq)
                self._released.append(seq.seq_id)
                self.num_denoisers -= seq.decoding.is_denoiser
        self._ended = [seq for seq in self._ended if seq not in gone]
        self.running = [seq for seq in self.running if seq not in gone]

    def take_released(self) -> tuple[int, ...]:
        """The seq_ids whose worker-side state can go, each told once."""
        released = tuple(self._released)
        self._released = []
        return released

    def check(self) -> None:
        """Raise AssertionError if queues, counters or pages contradict each other."""
        invariants.check_queues(self.by_id, self.running, self.waiting, self._ended, self.num_queued_tokens)
        invariants.check_memory(self._memory, self.running)
