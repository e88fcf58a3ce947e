# SPDX-License-Identifier: MIT
"""What is done to a store after each commit: generations removed, and long chains compacted behind the program."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DirtyTrackError
from .chains import compacted, removable
from .crew import Worker
from .protocols import Kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from .chains import Retention
    from .coding import Decoder, Encoder
    from .manifests import Manifest
    from .protocols import Store, Writer

__all__ = ["Tending"]

_log = logging.getLogger("dirtytrack")
_SPARE_NBYTES = 1 << 20  # a chain that is shorter is read in no time
_MEMORY_NBYTES = 16 << 20  # beside the program; and the less, the sooner it ends when it is told to
_MOST_SEGMENTS = 1000  # a manifest lists them all


class _Stopped(Exception):
    """The store is to be closed."""


class Tending:
    """Called with each manifest that was committed; returns the one to go on with, whose segments may be others.

    A generation is compacted in a thread of its own while saves go on. Once it is, its new segments take the place of
    the ones that they were made of in the manifests of the saves to come. Until one of those is committed, retention
    does not remove it, nor its older revision.

    Args:
        store, writer: which, and the right to write to it.
        encoder, decoder: for compacting; ``encrypts``: whether the encoder does.
        retain: which generations are kept.
        compact: see `Checkpointer`.
        can_compact: whether what is stored can be read.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        store: Store,
        writer: Writer,
        encoder: Encoder,
        decoder: Decoder,
        *,
        retain: Retention | None,
        compact: float | None,
        encrypts: bool,
        can_compact: bool,
    ) -> None:
        self._store, self._writer, self._encoder, self._decoder = store, writer, encoder, decoder
        self._retain, self._compact, self._encrypts, self._can_compact = retain, compact, encrypts, can_compact
        self.full_next = False
        """Whether the next save is to be full, because the chain has become long and cannot be compacted."""
        self.report: Callable[[BaseException], object] = lambda _: None
        """Told of what goes wrong in the thread."""
        self._thread: threading.Thread | None = None
        self._before: Manifest | None = None  # what is compacted
        self._after: Manifest | None = None  # what came of it
        self._stop = False
        self._full = 0  # the newest full generation, where it was saved since this began
        self._put_off = 0  # the newest generation when something was to be removed, and could not be

    def __call__(self, manifest: Manifest) -> Manifest:
        """A generation was committed."""
        manifest = self._adopted(manifest)
        if manifest.kind == "full":
            self._full = manifest.generation
        if self._compact is not None and self._before is None and self._has_grown(manifest, self._compact):
            if self._can_compact:
                self._begin(manifest)
            else:
                self.full_next = True
        elif self._compact is None and len(manifest.segments) > _MOST_SEGMENTS:
            self.full_next = True
        if self._retain is not None:
            self._prune(self._retain, manifest.generation)
        return manifest

    def _prune(self, retain: Retention, newest: int) -> None:
        held = 0 if self._before is None else self._before.generation
        gone = [each for each in removable(self._store, retain, whole=newest) if each.generation != held]
        done = not gone or self._writer.remove(gone)
        self._put_off = 0 if done else newest  # somebody reads, or it is compacted

    def _has_grown(self, manifest: Manifest, bound: float) -> bool:
        segments = manifest.segments
        if not segments:
            return False
        full = max(self._full, segments[0].generation)  # it may name what saves that failed left to it
        first = sum(each.nbytes for each in segments if each.generation <= full)
        return manifest.stored_nbytes - first > bound * first + _SPARE_NBYTES or len(segments) > _MOST_SEGMENTS

    # ---- compacting

    def _begin(self, manifest: Manifest) -> None:
        self._before, self._after = manifest, None
        self._thread = Worker(target=self._run, args=(manifest,), name="dirtytrack-compact", daemon=True)
        self._thread.start()

    def _run(self, manifest: Manifest) -> None:
        try:
            made = compacted(
                self._store,
                self._writer,
                manifest.generation,
                self._encoder,
                self._decoder,
                encrypts=self._encrypts,
                memory_bytes=_MEMORY_NBYTES,
                progress=self._progress,
            )
            self._after = made
        except _Stopped:
            pass
        except BaseException as error:  # no generation is the worse for it
            _log.warning("generation %d was not compacted: %s", manifest.generation, error)
            if not self._stop:
                self.report(error)

    def _progress(self, done: int, total: int) -> None:
        if self._stop:
            raise _Stopped

    def _adopted(self, manifest: Manifest) -> Manifest:
        """With the segments of what was compacted, where that has come to its end."""
        before, after, thread = self._before, self._after, self._thread
        if before is None or thread is None or thread.is_alive():
            return manifest
        thread.join()
        parts = len(before.segments)
        if after is not None and manifest.segments[:parts] == before.segments:
            return replace(manifest, segments=after.segments + manifest.segments[parts:])
        self._before = None
        if after is not None:  # the manifest has its segments, or a full save came between
            self._writer.remove([Kept(after.generation, below) for below in range(after.revision)])
        return manifest

    def close(self) -> None:
        """End what is compacted."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()
        if self._put_off and self._retain is not None:
            try:
                self._prune(self._retain, self._put_off)
            except DirtyTrackError as error:  # another time
                _log.warning("older generations were not removed: %s", error)
