# SPDX-License-Identifier: MIT
"""One rank's part: a Checkpointer whose commits wait until all ranks have prepared theirs."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import DirtyTrackError, RankFailed, RankLost, RanksDisagree
from ...kernel import core
from ..chains import Retention, removable
from ..checkpointer import Checkpointer
from ..crew import Worker
from ..jobs import Save
from ..options import as_json
from ..ranked import Part
from ..saving import Saver
from .rounds import Verdict, as_failed, as_nothing, as_prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from typing_extensions import Self

    from ..going_on import Left
    from ..jobs import Job
    from ..manifests import Manifest
    from ..protocols import Kept, Source, Store, Writer
    from ..segmenting import Parts
    from ..segments import SegmentWriter
    from .rounds import Rounds

__all__ = ["Agreement", "AsAgreed", "NoPart", "PartCheckpointer", "PartStore", "PartWriter"]

_log = logging.getLogger("dirtytrack")


class Agreement:
    """What a rank's part shares with those that save it. The rounds begin when all ranks have a part to save to.

    Attributes:
        part: which it is.
        how: the buffers that are shared between ranks, and how.
        store: that of all ranks.
        left: of ranks that there were once and are no more, those whose parts this rank looks after.
        rounds: see `Rounds`.
    """

    def __init__(self, part: Part, how: Mapping[str, str], store: Store) -> None:
        self.part, self.how, self.store = part, dict(how), store
        self.left = [rank for rank in store.parts() if rank >= part.size and rank % part.size == part.rank]
        self.rounds: Rounds | None = None
        self._hows: dict[int, dict[str, str]] = {}

    def begin(self, generation: int) -> None:
        """A save begins: how buffers are shared now is how they are in it, whatever changes before it is durable."""
        self._hows[generation] = dict(self.how)

    def held(self) -> Rounds:
        """The rounds, which have begun."""
        assert self.rounds is not None, "nothing is saved before"
        return self.rounds

    def prepared(self, manifest: Manifest) -> None:
        """A part is durable: wait until all are, and committed. Raises as `Rounds.commit`."""
        how = self._hows.pop(manifest.generation)
        self.held().commit(manifest.generation, as_prepared(manifest, how, self.part.rank))

    def nothing(self, generation: int, meta: Any) -> None:
        """There is no part here: wait until all others are durable, and committed. Raises as `Rounds.commit`."""
        how = self._hows.pop(generation)
        self.held().commit(generation, as_nothing(generation, meta, how, self.part.rank, core.PAGE_BYTES))

    def forget(self, generation: int) -> None:
        """A save came to nothing here."""
        self._hows.pop(generation, None)

    def tidy(self) -> None:
        """Remove what ranks that are no more have of generations that are gone.

        Raises:
            StoreBusy, StoreFailed, DamagedCheckpoint, InvalidCheckpoint: it could not be.
        """
        for rank in tuple(self.left):
            with closing(self.store.part(rank)) as part, part.writer() as writer:
                gone = removable(part, AsAgreed(self), whole=0)
                if gone:
                    writer.remove(gone)
                if not part.catalog():
                    self.left.remove(rank)


class AsAgreed(Retention):
    """Of a part, what generations of all ranks need; and what is still to become one."""

    def __init__(self, agreement: Agreement) -> None:
        object.__setattr__(self, "_agreement", agreement)

    def kept(self, generations: Collection[int], created: Callable[[int], float], now: float) -> set[int]:
        """Those of them that are kept."""
        agreement: Agreement = self._agreement  # type: ignore[attr-defined]
        return {generation for generation in generations if agreement.held().keeps(generation)}


class PartStore:
    """The store of a rank's parts, whose writer commits with the other ranks: see `Store`."""

    def __init__(self, store: Store, agreement: Agreement) -> None:
        self._store, self._agreement = store, agreement

    @property
    def name(self) -> str:
        """For messages."""
        return self._store.name

    @property
    def store_id(self) -> str:
        """See `Store.store_id`."""
        return self._store.store_id

    @property
    def held_nbytes(self) -> int:
        """See `Store.held_nbytes`."""
        return self._store.held_nbytes

    def catalog(self) -> tuple[Kept, ...]:
        """See `Store.catalog`."""
        return self._store.catalog()

    def manifest(self, generation: int | None = None, revision: int | None = None) -> Manifest:
        """See `Store.manifest`."""
        return self._store.manifest(generation, revision)

    def open_segment(self, name: str) -> Source:
        """See `Store.open_segment`."""
        return self._store.open_segment(name)

    def reading(self) -> AbstractContextManager[None]:
        """See `Store.reading`."""
        return self._store.reading()

    def writer(self) -> Writer:
        """See `Store.writer`."""
        return PartWriter(self._store.writer(), self._agreement)

    def part(self, rank: int, *, create: bool = False) -> Store:
        """See `Store.part`."""
        return self._store.part(rank, create=create)

    def parts(self) -> tuple[int, ...]:
        """See `Store.parts`."""
        return self._store.parts()

    def strangers(self) -> tuple[str, ...]:
        """See `Store.strangers`."""
        return self._store.strangers()

    def damage(self) -> tuple[str, ...]:
        """See `Store.damage`."""
        return self._store.damage()

    def close(self) -> None:
        """See `Store.close`."""
        self._store.close()


class PartWriter:
    """The right to write to a rank's part: see `Writer`. To publish a generation there is to prepare it only; this
    returns when all ranks have, and it is committed. A further revision of one is the rank's own business."""

    def __init__(self, writer: Writer, agreement: Agreement) -> None:
        self._writer, self._agreement = writer, agreement

    def create_segment(self, generation: int) -> SegmentWriter:
        """See `Writer.create_segment`."""
        return self._writer.create_segment(generation)

    def next_generation(self) -> int:
        """See `Writer.next_generation`."""
        return self._writer.next_generation()

    def publish(self, manifest: Manifest) -> None:
        """Prepare a generation, and wait until it is committed; or publish a further revision.

        Raises:
            StoreFailed: as of `Writer.publish`.
            RankFailed, RanksDisagree, RankLost: as of `Rounds.commit`. What was prepared stays until a later
                generation is committed: where ranks are lost, nobody here knows whether it is needed.
        """
        if manifest.revision:
            self._writer.publish(manifest)
            return
        prepared = replace(manifest, ranks=self._agreement.part)
        self._writer.publish(prepared)
        self._agreement.prepared(prepared)

    def failure(self, generation: int, error: BaseException) -> Exception:
        """The error that this rank's own is for all ranks; its cause is that."""
        said = as_failed(error)
        told = Verdict("failed", (self._agreement.part.rank,), said["why"], said["errno"]).problem(
            generation, self._agreement.part.rank
        )
        assert told is not None
        told.__cause__ = error
        return told

    def refuse(self, generation: int, error: BaseException) -> None:
        """Tell the other ranks that this part cannot be saved, where they were told nothing of it yet."""
        self._agreement.forget(generation)
        self._agreement.held().say(generation, as_failed(error))

    def tidy(self) -> None:
        """See `Agreement.tidy`."""
        self._agreement.tidy()

    def remove(self, manifests: Sequence[Kept]) -> bool:
        """See `Writer.remove`."""
        return self._writer.remove(manifests)

    def clean(self) -> tuple[str, ...]:
        """See `Writer.clean`."""
        return self._writer.clean()

    def close(self) -> None:
        """See `Writer.close`."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _PartSaver(Saver):
    """Tells the other ranks of what fails, so that none waits for it."""

    aside: BaseException | None = None
    """What went wrong beside the saves, in removing or compacting. The next save does not raise it: that would be at
    this rank only, and fail the save of all."""

    def report(self, error: BaseException, save: Save | None = None) -> None:
        """Something went wrong that is to be told: see `Saver.report`."""
        if save is None:
            self.aside = self.aside or error
        else:
            super().report(error, save)

    def _after(self, manifest: Manifest) -> None:
        super()._after(manifest)
        assert isinstance(self._writer, PartWriter)
        try:
            self._writer.tidy()
        except DirtyTrackError as error:  # the save is safe all the same
            _log.warning("parts of ranks that are no more were not removed: %s", error)
            self.report(error)

    def _left_by(self, job: Job, parts: Parts) -> Left | None:
        """Nothing of what was prepared: whether a generation has it, is for all ranks to say."""
        return None if parts.published else super()._left_by(job, parts)

    def _fail(self, job: Job, error: BaseException, left: Left | None = None) -> None:
        assert isinstance(self._writer, PartWriter)
        generation, told = job.save.generation or 0, error
        if error is not job.aborted and not isinstance(error, (RankFailed, RankLost, RanksDisagree)):
            told = self._writer.failure(generation, error)
        super()._fail(job, told, left)  # first of all, the pages go back
        self._writer.refuse(generation, error)


class PartCheckpointer(Checkpointer):
    """Saves a rank's part: a Checkpointer whose generations are numbered by the rounds."""

    _saver_kind = _PartSaver
    _of_ranks = True

    def raise_aside(self) -> None:
        """Raise what went wrong beside the saves, once."""
        assert isinstance(self._saver, _PartSaver)
        error, self._saver.aside = self._saver.aside, None
        if error is not None:
            raise error

    @property
    def following(self) -> int:
        """A generation that nothing in this part has."""
        return self._writer.next_generation()

    def save_as(self, generation: int, meta: Any, full: bool) -> Save:
        """As `Checkpointer.save`, as that generation."""
        self._numbers = iter((generation,))
        return self.save(meta, full=full)


class NoPart:
    """What stands in the place of a `PartCheckpointer` at a rank that has no buffer to save: it takes part in the
    rounds, and has nothing to say there but that it is at the same step."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._last: Save | None = None
        self._unreported: BaseException | None = None
        self._aside: DirtyTrackError | None = None
        self.buffers: tuple[str, ...] = ()
        self.staging_bytes = 0

    def save_as(self, generation: int, meta: Any, full: bool) -> Save:
        """A save of nothing, which is over when that of all is."""
        self.wait()
        kept = as_json(meta() if callable(meta) else meta)
        save = self._last = Save(generation, "full" if full else "increment", kept)
        save._told = self._forget
        Worker(target=self._run, args=(generation, save), name="dirtytrack-save", daemon=True).start()
        return save

    def _run(self, generation: int, save: Save) -> None:
        agreement = self._agreement
        try:
            agreement.nothing(generation, save.meta)
        except BaseException as error:
            self._unreported = error
            save._end("failed", error)
            return
        save._end("committed")
        try:
            agreement.tidy()
        except DirtyTrackError as error:
            _log.warning("parts of ranks that are no more were not removed: %s", error)
            self._aside = error

    def _forget(self) -> None:
        self._unreported = None

    def hand_over(self, part: PartCheckpointer) -> None:
        """That one saves from now on: it tells what nobody was told of yet."""
        if self._last is not None:
            self._last._over(None)
            if self._unreported is not None:
                part._saver.report(self._unreported, self._last)
        if self._aside is not None:
            part._saver.report(self._aside)

    def raise_aside(self) -> None:
        """As `PartCheckpointer.raise_aside`."""
        error, self._aside = self._aside, None
        if error is not None:
            raise error

    def wait(self, timeout: float | None = None) -> bool:
        """As `Checkpointer.wait`."""
        done = self._last is None or self._last._over(timeout)
        error, self._unreported = self._unreported, None
        if error is not None:
            raise error
        return done

    def close(self) -> None:
        """As `Checkpointer.close`."""
        self.wait()
