"""The link: every message comes back as it was, nothing that arrives can raise, nothing is left on disk."""

from __future__ import annotations

import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from scheduler.policies import POLICIES, make_diffusion
from scheduler.types import (
    DecodingUsage,
    Delta,
    DiffusionModel,
    EosRule,
    Fault,
    FinishReason,
    Grammar,
    GrammarKind,
    Request,
    RequestTimes,
    Sampling,
    Snapshot,
    StepStats,
    TokenLogprob,
    Topology,
)
from server.engine.link import Abort, Add, Address, Ready, Stop, Update, client_codec, engine_codec, remove_stale
from tests.server.api.fake_engine import FakeEngine, byte_tokenizer

SAMPLING = Sampling(
    0.5, logit_bias=((1, 2.0),), bad_words=((1, 2),), seed=2**64 - 1, grammar=Grammar(GrammarKind.REGEX, "a+")
)
REQUEST = Request("r", (1, 2, 3), 9, SAMPLING, (2,), (7, 8), -1, "salt")
DENOISED = [
    Request("d", (1, 2), 9, decoding=decoding)
    for topology in Topology
    for name, policy in POLICIES.items()
    if policy.topology in (None, topology)
    for plain in (make_diffusion(name, topology),)
    for decoding in (plain, replace(plain, steps=3, filtered=True, eos=EosRule.LAST, delimiters=(1,), snapshots=True))
]
LOGPROB = TokenLogprob(5, -0.25, 1, ((5, -0.25), (6, -2.0)))
DELTA = Delta(
    "r", (5,), (LOGPROB,), (LOGPROB,), FinishReason.STOP, 5, 16, RequestTimes(0.1, 0.2, 0.3, 1), Fault(500, "no", "p")
)

SHOWN = Delta("d", decoding=DecodingUsage(1, 2, 3), snapshot=Snapshot(8, (1, 2), 3))
INFO = replace(
    FakeEngine(byte_tokenizer()).info, diffusion=DiffusionModel(5, 8, Topology.BIDIRECTIONAL, 1, True, "dual")
)


@pytest.mark.parametrize("message", [*map(Add, DENOISED), Add(REQUEST), Add(Request("s", (1,), 1)), Abort("r"), Stop()])
def test_what_the_client_says_arrives_as_it_was(message: Add | Abort | Stop) -> None:
    assert engine_codec().decode(client_codec().encode(message)) == message


@pytest.mark.parametrize(
    "message", [Ready(INFO), Update(), Update((DELTA, SHOWN, Delta("t")), (StepStats(3), StepStats(4)))]
)
def test_what_the_engine_says_arrives_as_it_was(message: Update | Ready) -> None:
    assert client_codec().decode(engine_codec().encode(message)) == message


def test_twenty_thousand_bad_frames_are_counted_and_dropped() -> None:
    rng = random.Random(1)
    codec = engine_codec()
    good = client_codec().encode(Add(REQUEST))
    dropped = 0
    for _ in range(20_000):
        if rng.random() < 0.5:
            frame = rng.randbytes(rng.randint(0, 60))
        else:
            mutated = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            frame = bytes(mutated[: rng.randint(1, len(mutated))])
        dropped += codec.decode(frame) is None
    assert codec.num_dropped == dropped > 15_000
    assert codec.decode(good) == Add(REQUEST)


def test_deep_nesting_and_wrong_types_are_dropped() -> None:
    codec = engine_codec()
    assert codec.decode(b"\x91" * 100_000) is None
    assert codec.decode(msgspec.msgpack.encode(["add", {"id": 5}])) is None
    assert codec.decode(msgspec.msgpack.encode(["update", [], []])) is None
    assert codec.num_dropped == 3


def test_the_socket_folder_is_private_and_removed() -> None:
    with Address() as address:
        assert stat.S_IMODE(address.folder.stat().st_mode) == 0o700
        assert len(address.endpoint.removeprefix("ipc://")) < 100
    assert not address.folder.exists()


def test_folders_of_dead_processes_are_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "braid-999999999-abc").mkdir()
    (tmp_path / f"braid-{os.getpid()}-abc").mkdir()
    (tmp_path / "braid-notes").mkdir()
    assert remove_stale(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"braid-{os.getpid()}-abc", "braid-notes"]
