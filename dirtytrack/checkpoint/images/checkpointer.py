# SPDX-License-Identifier: MIT
"""ProcessCheckpointer: saves all of a running process, which knows nothing of it, again and again."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ...errors import CheckpointerClosed, InvalidCheckpoint, InvalidMemory, TargetGone, UsedAfterFork
from ...kernel import core
from ...kernel.packing import PageDigests
from ..coding import Decoder, Encoder
from ..crew import Crew, default_threads
from ..manifests import Manifest
from ..options import as_json, frame_nbytes, require_kinds
from ..staging import Staging
from ..store import require_store, store_of
from ..tending import Tending
from .attempt import Attempt
from .copying import Compared, Copying
from .frames import Frames
from .results import Image
from .space import Space, pages_of
from .watched import Watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from ...process.mappings import Pattern
    from ..chains import Retention
    from ..manifests import SegmentEntry
    from ..protocols import Store, Writer

__all__ = ["ProcessCheckpointer"]

_log = logging.getLogger("dirtytrack")
_MOST_STRETCHES = 16384
_LEAST_STAGING, _MOST_STAGING = 64 << 20, 512 << 20


class ProcessCheckpointer:
    """Saves a running process into a store: consistent images, of which each after the first pays for what was written.

    The process is attached to as `dirtytrack.process.attach` does it: it need not know of this, and goes on whoever is
    killed. `save` has it stand still while its registers, its mappings and the pages that it wrote since the save
    before are copied, and for nothing else: to compress, to write and to wait for the disk comes after it went on. What
    is much is copied before, while it runs, and only what was written meanwhile once more while it stands still.

    **No page is lost to a save that fails**: its pages are in the next one.

    Args:
        store: a directory (made where there is none), or a `Store`. One at a time may write to it.
        pid: the process.
        exclude: mappings that are not saved: names (``"/dev/shm/*"``, ``"[heap]"``; ``"[anon]"`` is what has none),
            (start, end) addresses, or a list of these. A mapping that is touched is left out as a whole. What is marked
            MADV_DONTDUMP is left out by itself.
        compression: ``"zstd"`` or None; ``level`` is zstd's.
        staging_bytes: of the buffer that pages are copied to while the process stands still. More than fits makes it
            stand still until the rest was compressed and written. Left out: a quarter of its private memory, at least
            64 MiB, at most 512 MiB.
        precopy_bytes: where more than so much is dirty, it is copied while the process runs, in up to 8 rounds.
        timeout: seconds within which the process must stand still.
        retain: after each save, remove the generations that this does not keep.
        compact: as with `Checkpointer`.
        encrypt, decrypt: functions from bytes to bytes, for each frame; registers and mappings are not encrypted.
        threads: how many compress and encrypt.
        seccomp: see `dirtytrack.process.attach`.

    A new ProcessCheckpointer begins with a full image, also of a process that an earlier one saved: nobody knows what
    was written in between.

    Raises:
        InvalidMemory, TargetGone, TargetBusy, PermissionDenied, UnsupportedKernel, LimitReached: as of `attach`.
        InvalidCheckpoint: the path is no store and holds something else; or an option makes no sense.
        StoreBusy, StoreFailed.

    Thread safety: everything may be called from any thread; calls follow one another.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        pid: int,
        *,
        exclude: Pattern | Iterable[Pattern] | None = None,
        compression: Literal["zstd"] | None = "zstd",
        level: int = 1,
        staging_bytes: int | None = None,
        precopy_bytes: int = 4 << 20,
        timeout: float = 2.0,
        retain: Retention | None = None,
        compact: float | None = 2.0,
        encrypt: Callable[[bytes], bytes] | None = None,
        decrypt: Callable[[bytes], bytes] | None = None,
        threads: int | None = None,
        seccomp: str | None = None,
    ) -> None:
        require_kinds(False, staging_bytes, retain, encrypt, decrypt)
        if compact is not None and not (type(compact) in (int, float) and compact > 0):
            raise InvalidCheckpoint(f"compact= is a number above 0, or None, not {compact!r}")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InvalidCheckpoint(f"threads= is a whole number from 1 on, not {threads!r}")
        if type(precopy_bytes) is not int or precopy_bytes < 0:
            raise InvalidMemory(f"precopy_bytes= is a number of bytes, not {precopy_bytes!r}")
        self._encoder, decoder = Encoder(compression, level, encrypt), Decoder(decrypt)
        self._threads = default_threads() if threads is None else threads
        self._precopy_nbytes, self._timeout = precopy_bytes, timeout
        self._pid, self._lock, self._closed = os.getpid(), threading.RLock(), False
        with ExitStack() as opened:
            self._watched = Watched(pid, exclude, timeout=timeout, seccomp=seccomp)
            opened.callback(self._watched.close)
            if isinstance(store, (str, os.PathLike)):
                self._store: Store = store_of(store, create=True)
                opened.callback(self._store.close)
            else:
                require_store(store)
                self._store = store
            self._writer: Writer = opened.enter_context(self._store.writer())
            self._staging = Staging(self._staging_nbytes() if staging_bytes is None else staging_bytes)
            self._tending = Tending(
                self._store,
                self._writer,
                self._encoder,
                decoder,
                retain=retain,
                compact=compact,
                encrypts=encrypt is not None,
                can_compact=encrypt is None or decrypt is not None,
            )
            opened.callback(self._tending.close)
            self._opened = opened.pop_all()
        self._space, self._owed, self._epoch = Space(), pages_of([]), -1
        self._digests, self._known = PageDigests(), dict[int, bytes]()
        self._base: Manifest | None = None

    def _staging_nbytes(self) -> int:
        nbytes = self._watched.tracked().page_span_bytes
        return max(_LEAST_STAGING, min(nbytes // 4, _MOST_STAGING))

    # ---- what it is

    @property
    def pid(self) -> int:
        """The process."""
        return self._watched.pid

    @property
    def store(self) -> Store:
        """Where it saves to."""
        return self._store

    @property
    def generation(self) -> int | None:
        """The last that was committed."""
        return None if self._base is None else self._base.generation

    @property
    def attach_stall(self) -> float:
        """How long the process stood still when it was attached to, in seconds."""
        return self._watched.tracker.attach_stall

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"generation {self.generation}"
        return f"<ProcessCheckpointer of {self.pid} into {self._store.name}: {state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a ProcessCheckpointer cannot be pickled: it holds a process")

    # ---- saving

    def save(self, meta: Any = None, *, full: bool = False) -> Image:
        """Save the process as it is at one instant. Returns when that is durable.

        Args:
            meta: anything that JSON has a word for, kept with it.
            full: all pages, whatever was written: a generation that needs no other one's segments.

        Raises:
            TargetGone: the process ended or replaced itself by exec, before or meanwhile. Nothing was saved; earlier
                generations are whole.
            TargetBusy: it did not stand still in time, or a debugger has it.
            PermissionDenied: it may no longer be traced.
            StoreFailed: the store's disk is full or broken.
            InvalidCheckpoint: JSON has no word for ``meta``; or there are too many threads and mappings for a manifest.
            CheckpointerClosed, UsedAfterFork.

        What raises has saved nothing; all pages are in the next save.
        """
        kept = as_json(meta)
        with self._lock:
            self._require_open()
            if self._epoch != self._watched.epoch:  # the first; or an interrupt came between collecting and noting it
                self._base = None
            full = full or self._base is None or self._tending.full_next or len(self._space) > _MOST_STRETCHES
            with Crew(self._threads) as crew:
                return self._save(kept, full, crew)

    def _save(self, meta: Any, full: bool, crew: Crew) -> Image:
        began, generation = time.perf_counter(), self._writer.next_generation()
        frames = Frames(self._writer, generation, self._encoder, crew)
        compared = Compared(self._digests, {} if full else self._known)
        attempt = Attempt(
            self._watched,
            self._space.renewed() if full else self._space,
            pages_of([]) if full else self._owed,
            Copying(
                self._watched.pid,
                self._watched.memory,
                self._staging,
                frame_nbytes(self._staging),
                frames,
                compared,
                self._watched.require_there,
            ),
            compared,
            generation,
            precopy_nbytes=self._precopy_nbytes,
            timeout=self._timeout,
        )
        try:
            with self._told():
                attempt.freeze(attempt.precopy())
            entries = frames.finish()
            manifest = self._manifest(attempt, generation, full, meta, entries)
            self._writer.publish(manifest)
        except BaseException:
            frames.abandon()
            if not full:
                self._owed = self._owed | attempt.collected
                self._epoch = attempt.epoch
            else:
                self._base = None
            raise
        self._space, self._known, self._owed = attempt.space, compared.now, pages_of(attempt.unreadable)
        self._base, self._epoch = manifest, attempt.epoch
        if full:
            self._tending.full_next = False
        image = Image(
            generation,
            "full" if full else "increment",
            attempt.frozen_seconds,
            time.perf_counter() - began,
            attempt.bytes_frozen,
            attempt.bytes_precopied,
            frames.nbytes,
            attempt.rounds,
            len(attempt.described["threads"]),
            len(attempt.described["mappings"]),
            manifest.nbytes,
        )
        try:
            self._base = self._tending(manifest)
        except Exception as error:  # the image is safe all the same
            _log.warning("after generation %d was committed: %s", generation, error)
        return image

    @contextmanager
    def _told(self) -> Iterator[None]:
        """That the process has gone is told as its tracker tells it, whoever found out."""
        try:
            yield
        except TargetGone as error:
            try:
                self._watched.require_there()
            except TargetGone as better:
                raise better from error
            raise

    def _manifest(
        self, attempt: Attempt, generation: int, full: bool, meta: Any, entries: tuple[SegmentEntry, ...]
    ) -> Manifest:
        base = None if full else self._base
        return Manifest(
            store_id=self._store.store_id,
            generation=generation,
            revision=0,
            parent=None if base is None else base.generation,
            created=attempt.described["frozen_at"],
            kind="full" if full else "increment",
            page_bytes=core.PAGE_BYTES,
            meta=meta,
            regions=attempt.space.regions(),
            segments=entries if base is None else base.segments + entries,
            threads=attempt.described,
        )

    # ---- the end

    def close(self) -> None:
        """Let go of the process and of the store. A second call does nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            self._opened.close()

    def __enter__(self) -> Self:
        self._require_own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_own(self) -> None:
        if os.getpid() != self._pid:
            raise UsedAfterFork(
                "this ProcessCheckpointer is the parent's: a child that was forked makes one of its own"
            )

    def _require_open(self) -> None:
        self._require_own()
        if self._closed:
            raise CheckpointerClosed(
                "this ProcessCheckpointer is closed: make another one; it begins with a full image"
            )
