# SPDX-License-Identifier: MIT
"""Coordinated: checkpoints of many ranks, each of which is there only once every rank has prepared its part."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ...errors import CheckpointerClosed, InvalidMemory, RankLost, StoreBusy, UsedAfterFork
from ..buffers import describe
from ..chains import Named, removable
from ..reading import letting_go
from .beginning import Beginning, made_part
from .communicators import communicator_of
from .layout import how_shared
from .parts import NoPart, PartCheckpointer
from .rounds import as_failed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from ..buffers import Saveable
    from ..chains import Retention
    from ..jobs import Save
    from ..protocols import Store
    from ..restoring import State

__all__ = ["Coordinated", "PartOptions", "coordinated"]

_PATIENCE_SECONDS = 10.0  # of a rank that leaves by an error, with others that may wait for it, for something else


class PartOptions(TypedDict, total=False):
    """What each rank may say of how its part is saved: see `Checkpointer`."""

    compression: Literal["zstd"] | None
    level: int
    deltas: bool
    staging_bytes: int | None
    when_busy: Literal["wait"]
    quiesce: Callable[[], AbstractContextManager[Any]] | None
    compact: float | None
    encrypt: Callable[[bytes], bytes] | None
    decrypt: Callable[[bytes], bytes] | None
    threads: int | None
    track: Mapping[str, Any] | None


def coordinated(
    comm: Any,
    store: Store | str | os.PathLike[str],
    buffers: Mapping[str, Saveable],
    *,
    partition: Mapping[str, int] | None = None,
    replicated: Collection[str] = (),
    resume: bool | int = False,
    retain: Retention | None = None,
    **options: Unpack[PartOptions],
) -> Coordinated:
    """Save the buffers of many ranks together: what `Checkpointer` is for one process.

    Each rank saves its own part, into a store of its own within the store, paying for what was written there since. A
    generation exists once every rank has prepared its part of it, and rank 0 has published that: whoever is killed
    when, rank or launcher, leaves the generation before, or this one, for all of them.

    All ranks call this together, and `Coordinated.save` and `Coordinated.close` as often and in the same order.

    Args:
        comm: by what the ranks talk: an intracommunicator of mpi4py, a process group of ``torch.distributed``, or a
            `Communicator`. Of the first two a duplicate is made, so that nothing that is said here meets what the
            program says.
        store: a directory that all ranks see, or a URL as ``s3://bucket/prefix``, or a `Store` for each. One program at
            a time may save to it.
        buffers: this rank's, by name.
        partition: the buffers that are parts of a larger one, divided along its first axis in the order of the ranks,
            by name, as ``{"grid": 0}``. They may differ in how many rows they have, and in nothing else.
        replicated: the names of buffers that have the same bytes at all ranks when they are saved: rank 0 saves them
            for all. Nobody compares them. What is neither partitioned nor replicated is each rank's own.
        resume: as of `Checkpointer`. On as many ranks with the same rows, the next save is an increment; otherwise what
            is partitioned is divided anew, each rank reads its own share, and the next save is full.
        retain: as of `Checkpointer`, of generations of all ranks. That of rank 0 counts.
        options: all others of `Checkpointer`, for this rank's part, but ``when_busy``: a save waits for the one before.

    Raises:
        RankFailed: another rank could not begin; its error is in the message.
        RanksDisagree: not all ranks gave the same store, ``partition``, ``replicated`` and ``resume``, or their buffers
            do not fit together.
        RankLost: the ranks do not reach one another.
        InvalidCheckpoint: what is partitioned cannot be divided, an option makes no sense, or ``comm`` is none.
        InvalidMemory, DamagedCheckpoint, NoSuchGeneration, StoreBusy, StoreFailed, PermissionDenied, UnsupportedKernel,
        RangeBusy, LimitReached: as of `Checkpointer`, at the rank where it is so.
    """
    return Coordinated(
        comm, store, buffers, partition=partition, replicated=replicated, resume=resume, retain=retain, **options
    )


class Coordinated:
    """This rank's side of what `coordinated` makes; see there.

    Thread safety: everything may be called from any thread; all ranks in the same order.
    """

    def __init__(
        self,
        comm: Any,
        store: Store | str | os.PathLike[str],
        buffers: Mapping[str, Saveable],
        *,
        partition: Mapping[str, int] | None = None,
        replicated: Collection[str] = (),
        resume: bool | int = False,
        retain: Retention | None = None,
        **options: Unpack[PartOptions],
    ) -> None:
        self._pid, self._lock, self._closed = os.getpid(), threading.RLock(), False
        self._comm = communicator_of(comm)
        try:
            with ExitStack() as stack, letting_go():
                begun = Beginning(self._comm, stack, partition, replicated, resume, retain, dict(options))
                begun.begin(store, buffers)
                self._part, self._rounds, self._store = begun.part, begun.rounds, begun.store
                self._state, self._agreement, self._options = begun.state, begun.agreement, dict(options)
                self._closing = stack.pop_all()
        except RankLost:
            raise
        except BaseException:  # at all ranks: they agree on each step
            self._comm.close()
            raise

    # ---- what it is

    @property
    def rank(self) -> int:
        """Which this one is."""
        return self._comm.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._comm.size

    @property
    def resumed(self) -> State | None:
        """What it went on from, with this rank's buffers; None where it began."""
        return self._state

    @property
    def store(self) -> Store:
        """Where the generations of all ranks are."""
        return self._store

    @property
    def generation(self) -> int | None:
        """The last that this rank knows to be committed, or was resumed from."""
        committed = self._rounds.committed
        return committed if committed is not None or self._state is None else self._state.generation

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of what this rank saves."""
        return self._part.buffers

    @property
    def staging_bytes(self) -> int:
        """Of this rank's staging buffer."""
        return self._part.staging_bytes

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.buffers)} buffers, generation {self.generation}"
        return f"<Coordinated into {self._store.name}: rank {self.rank} of {self.size}, {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Coordinated cannot be pickled: it saves this process's memory")

    # ---- which buffers

    def add(self, name: str, buffer: Saveable, *, partition: int | None = None, replicated: bool = False) -> None:
        """Save another buffer from now on, at all ranks: see `Checkpointer.add`. All ranks call this, between the same
        two saves; that it fits together is found out by the next one.

        Args:
            name, buffer: as of `Checkpointer.add`.
            partition: 0 where it is a part of a larger one, divided along its first axis.
            replicated: whether it is the same at all ranks.

        Raises:
            InvalidCheckpoint: ``partition`` is neither 0 nor None, or both are given.
            StoreBusy, StoreFailed, PermissionDenied: this rank had no buffer until now, and no store can be had for it.
            InvalidMemory, CheckpointerClosed, UsedAfterFork, RangeBusy, LimitReached: as of `Checkpointer.add`.
        """
        with self._alone("add"):
            self._require_open()
            how = how_shared(
                {name: describe(name, buffer)},
                None if partition is None else {name: partition},
                [name] if replicated else [],
            )
            if not replicated or not self.rank:
                if isinstance(self._part, PartCheckpointer):
                    self._part.add(name, buffer)
                else:
                    self._part = self._first_part(self._part, name, buffer)
            self._agreement.how = dict(sorted({**self._agreement.how, **how}.items()))

    def remove(self, name: str) -> None:
        """Save a buffer no more, at all ranks: see `Checkpointer.remove`. All ranks call this, between the same two
        saves.

        Raises:
            InvalidMemory, CheckpointerClosed, UsedAfterFork: as of `Checkpointer.remove`.
        """
        with self._alone("remove"):
            self._require_open()
            if self._agreement.how.get(name) != "replicated" or not self.rank:
                self._saving_part().remove(name)
            self._agreement.how = {each: how for each, how in self._agreement.how.items() if each != name}

    def replace(self, name: str, buffer: Saveable) -> None:
        """Save another buffer under that name, shared as it was: see `Checkpointer.replace`. A rank that is to have
        more rows of what is partitioned, or fewer, calls this, and only it need.

        Raises:
            InvalidMemory, CheckpointerClosed, UsedAfterFork, RangeBusy, LimitReached: as of `Checkpointer.replace`.
        """
        with self._alone("replace"):
            self._require_open()
            if self._agreement.how.get(name) != "replicated" or not self.rank:
                self._saving_part().replace(name, buffer)

    def _saving_part(self) -> PartCheckpointer:
        if isinstance(self._part, PartCheckpointer):
            return self._part
        raise InvalidMemory("this rank has no buffer yet: add() one")

    def _first_part(self, before: NoPart, name: str, buffer: Saveable) -> PartCheckpointer:
        """Of a rank that had nothing to save until now."""
        with ExitStack() as stack:
            store = self._store.part(self.rank, create=True)
            stack.callback(store.close)
            with store.writer() as writer:  # nothing that no generation has may have the number of one to come
                writer.remove(removable(store, Named(kept.generation for kept in self._store.catalog()), whole=0))
            part = made_part(self._agreement, store, {name: buffer}, self._options)
            stack.callback(part.close)
            before.hand_over(part)
            self._closing.push(stack.pop_all())
        return part

    # ---- saving

    def save(self, meta: Any = None, *, full: bool = False) -> Save:
        """Save all buffers of all ranks as they are now. All ranks call this, at the same step of their program.

        Returns as soon as this rank's are copied, without waiting for another rank: that the parts are of one instant
        is because all ranks call it at the same step. Where MPI's threads do not allow more
        (`Communicator.background`), it returns when all ranks have saved.

        Args:
            meta: as of `Checkpointer.save`, and the same at all ranks.
            full: all bytes of this rank.

        Returns:
            A `Save`: of the generation that is the same at all ranks, and else of this rank. `Save.wait` is over when
            it is committed for all of them, or failed for all.

        Raises:
            RankFailed: as `Save.wait`, of an earlier save, once; or another rank saves no more.
            RanksDisagree: of an earlier save: the ranks gave different meta or buffers that do not fit together.
            RankLost: the ranks do not reach one another any more. Make another one, with ``resume=True``.
            All else as of `Checkpointer.save`, at the rank where it is so; at the others this save fails then.

        A save that fails at one rank fails at all, and what was written since is in the next one, everywhere. What
        raises at one rank is to be handled at all in the same way: whoever calls `save` less often than the others
        leaves them waiting.
        """
        with self._alone("save"):
            self._require_open()
            generation = self._rounds.begin()
            self._agreement.begin(generation)
            try:
                save = self._part.save_as(generation, meta, full)
            except BaseException as error:
                self._agreement.forget(generation)
                self._rounds.say(generation, as_failed(error))
                raise
            if not self._comm.background:
                save._over(None)
            return save

    def wait(self, timeout: float | None = None) -> bool:
        """As `Checkpointer.wait`: until nothing of this rank's is under way. What went wrong in removing or compacting
        is told here, or by `close`."""
        self._require_own()
        done = self._part.wait(timeout)
        self._part.raise_aside()
        return done

    # ---- the end

    def close(self) -> None:
        """Wait until nothing is under way at any rank, then let go of everything. All ranks call this; a second call
        does nothing. A ``with`` that is left by an error waits for other ranks for ten seconds at most.

        Raises:
            RankFailed, or whatever a save failed of that nobody was told of yet; all is let go of first.
        """
        if os.getpid() != self._pid:
            return
        with self._alone("close"):
            self._close(None)

    def _close(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._closed = True
        together = False
        with self._closing:
            if error is not None:
                self._rounds.leave(error, _PATIENCE_SECONDS)  # nothing waits for other ranks after this
            try:
                self._part.close()
            finally:
                if error is None:
                    together = self._rounds.leave(None)
        if together:  # else it is left as it is: to let go of it is for all
            self._comm.close()
        self._part.raise_aside()

    def __enter__(self) -> Self:
        self._require_own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:
            return
        try:
            with self._alone("close"):
                self._close(error)
        except Exception:
            if error is None:
                raise  # else what went wrong in the block is what must be seen; the failed save was logged

    def _require_own(self) -> None:
        if os.getpid() != self._pid:
            raise UsedAfterFork("this Coordinated is the parent's: a child that was forked is no rank")

    def _alone(self, doing: str) -> threading.RLock:
        self._require_own()
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise StoreBusy(
                f"{doing}() was called while this thread is in another call, by a signal handler, a finaliser, quiesce "
                "or encrypt"
            )
        return self._lock

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointerClosed("this Coordinated is closed: make another one, with resume=True to go on")
