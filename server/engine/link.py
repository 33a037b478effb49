"""The front end and the engine, joined: typed messages, msgpack, one local socket in a private folder.

No pickle, no TCP. The listening side makes a 0700 folder and binds an ipc PAIR socket in it; the other side connects.
A frame that does not decode, or is too big, is counted and dropped (S-71): the link never raises for what it reads.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import msgspec
import zmq

from scheduler.types import Delta, Request, StepStats
from server.engine.config import EngineInfo

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 << 20
"""Above any legal message (a step of prompt logprobs is the largest); zmq closes the connection beyond it."""


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """A request; `is_resubmission`: an engine that is no more had accepted it, so a full queue refuses it no more."""

    request: Request
    is_resubmission: bool = False


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    request_id: str


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """The engine exits with 0 after the step it is in."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine could not start: one line for a person."""

    message: str


class Update(msgspec.Struct, frozen=True, array_like=True, tag="update"):
    """News since the last message: deltas in order, and the steps that made them. Empty = heartbeat."""

    deltas: tuple[Delta, ...] = ()
    steps: tuple[StepStats, ...] = ()


ToEngine = Add | Abort | Stop
FromEngine = Ready | StartFailed | Update

Sent = TypeVar("Sent", ToEngine, FromEngine)
Received = TypeVar("Received", ToEngine, FromEngine)


class Codec(Generic[Sent, Received]):
    """Encodes what one side says, decodes what it hears."""

    def __init__(self, received: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)
        self.num_dropped = 0

    def encode(self, message: Sent) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes) -> Received | None:
        """The message, or None (counted, logged once per power of two) for a frame that is not one."""
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, RecursionError, OverflowError, ValueError) as error:
            self.num_dropped += 1
            if self.num_dropped & (self.num_dropped - 1) == 0:
                logger.error("link: dropped a frame of %d bytes: %s (%d so far)", len(frame), error, self.num_dropped)
            return None


def client_codec() -> Codec[ToEngine, FromEngine]:
    return Codec[ToEngine, FromEngine](FromEngine)


def engine_codec() -> Codec[FromEngine, ToEngine]:
    return Codec[FromEngine, ToEngine](ToEngine)


class Address:
    """A private folder (0700) with the socket in it; removed on `close`, and by the next start if we were killed."""

    PREFIX = "braid-"

    def __init__(self, parent: str | None = None) -> None:
        remove_stale(Path(parent or tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.PREFIX}{os.getpid()}-", dir=parent))
        self.endpoint = f"ipc://{self.folder}/engine.sock"

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def remove_stale(parent: Path) -> int:
    """Remove socket folders of our own user whose process is gone (R-21); how many."""
    removed = 0
    for folder in parent.glob(f"{Address.PREFIX}*-*"):
        pid = folder.name[len(Address.PREFIX) :].split("-")[0]
        try:
            if not pid.isdecimal() or folder.stat().st_uid != os.getuid() or folder.is_symlink():
                continue
        except OSError:
            continue
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def configure(socket: Any) -> None:
    """Options both ends share: no lost and no endless messages, no waiting for a peer at close.

    The queues are unbounded on purpose: the engine must never wait for the front end (R-15), and what can be in them is
    bounded by the tokens of the requests in flight.
    """
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
