# SPDX-License-Identifier: MIT
"""What a store of checkpoints must be able to do.

It is little, so that an object store can be one: objects appear whole and once, are never overwritten or renamed, and
are found by listing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from typing_extensions import Self

    from .manifests import Manifest
    from .segments import SegmentWriter

__all__ = ["Kept", "Sink", "Source", "Store", "Writer"]


class Kept(NamedTuple):
    """A manifest that is in a store."""

    generation: int
    revision: int


class Source(Protocol):
    """An open segment, to be read. May be used from any thread."""

    @property
    def name(self) -> str:
        """Of its file."""

    @property
    def nbytes(self) -> int:
        """Of it."""

    def will_read(self, spans: Iterable[tuple[int, int]]) -> None:
        """A hint: these will be read, offset and length, each once, in about this order. One that is far away asks for
        them ahead."""

    def read_into(self, buffers: Sequence[Any], offset: int) -> None:
        """Fill these writable buffers with the bytes from ``offset`` on.

        Raises:
            DamagedCheckpoint: it ends before.
            StoreFailed: it cannot be read.
        """

    def read_summed(self, room: Any, offset: int) -> int:
        """Fill a writable buffer with the bytes from ``offset`` on; their XXH64.

        Raises: as `read_into`.
        """

    def close(self) -> None:
        """Close it."""


class Sink(Protocol):
    """A segment on its way into a store. One thread at a time."""

    @property
    def name(self) -> str:
        """Of its file."""

    @property
    def nbytes(self) -> int:
        """Written so far."""

    @property
    def most_nbytes(self) -> int:
        """That one may have; who has more to write begins another one."""

    @property
    def whole_nbytes(self) -> int:
        """After so many a save finishes it and begins another one, since where the save fails later, what is finished
        need not be sent again. 0: it does not, what is there is soon written again."""

    def write(self, data: Any, lent_nbytes: int = 0) -> None:
        """Write all of a contiguous buffer behind what is there.

        Args:
            data: the buffer.
            lent_nbytes: of how many such bytes views may still be held when this returns; they do not change before
                all are let go of. 0: what is needed longer is copied, but for `bytes`.

        Raises:
            StoreFailed: it cannot be written. The segment is of no use then: `abandon` it.
        """

    def finish(self) -> None:
        """Make it durable, and close it. What a manifest may name must have been finished."""

    def abandon(self) -> None:
        """Close and remove it; never fails. After `finish` too, as long as no manifest that names it was published."""


class Writer(Protocol):
    """The right to write to a store, which one at a time has. Any thread may call."""

    def create_segment(self, generation: int) -> SegmentWriter:
        """Begin a segment for a generation that is to be saved or compacted."""

    def next_generation(self) -> int:
        """A number that no manifest and no segment here has, larger than all of them. It is taken by being used."""

    def publish(self, manifest: Manifest) -> None:
        """Make a generation (or a further revision of one) exist, durably: the commit.

        Raises:
            StoreFailed: it could not be written, and is not there; or, where the failure came after it appeared, was
                removed again as well as that goes. A later generation may follow either way.
        """

    def remove(self, manifests: Sequence[Kept]) -> bool:
        """Remove manifests, durably, then the segments that no manifest names any more.

        Returns:
            False where somebody reads: nothing was removed, come back later.
        """

    def clean(self) -> tuple[str, ...]:
        """Remove what writers that were killed or failed left behind; the names of it. Opening a writer does it."""

    def close(self) -> None:
        """Give the right back. What was begun and not published is removed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """Where checkpoints are kept. Any thread may call."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def store_id(self) -> str:
        """Random, in 32 hexadecimal digits."""

    @property
    def held_nbytes(self) -> int:
        """How many bytes of what is lent to it (`Sink.write`) it holds where it can send as fast as it may."""

    def catalog(self) -> tuple[Kept, ...]:
        """The manifests that are there, oldest first."""

    def manifest(self, generation: int | None = None, revision: int | None = None) -> Manifest:
        """Read a manifest: of the newest generation where none is given; its highest revision that is whole.

        Raises:
            NoSuchGeneration: there is none.
            DamagedCheckpoint: it is there, but not as it was written; ``generation`` says which.
            InvalidCheckpoint: it makes no sense, or is of another version.
        """

    def open_segment(self, name: str) -> Source:
        """Open a segment that a manifest names.

        Raises:
            DamagedCheckpoint: it is missing.
        """

    def reading(self) -> AbstractContextManager[None]:
        """While in here nothing is removed: from before the manifest is read until the last segment was."""

    def writer(self) -> Writer:
        """Become the one who writes.

        Raises:
            StoreBusy: somebody else does; ``pid`` where that is known.
            PermissionDenied, StoreFailed: it cannot be written.
        """

    def part(self, rank: int, *, create: bool = False) -> Store:
        """The store that a rank's parts of generations are in, within this one; who calls closes it.

        Args:
            create: make it where it is not there.

        Raises:
            InvalidCheckpoint: it is not there.
            DamagedCheckpoint, PermissionDenied, StoreFailed: it cannot be opened.
        """

    def parts(self) -> tuple[int, ...]:
        """The ranks that have such a store here, in order."""

    def strangers(self) -> tuple[str, ...]:
        """What is in the store and belongs to no generation: leftovers, a save that goes on, other people's files."""

    def damage(self) -> tuple[str, ...]:
        """What is wrong with the store itself, a sentence each; generations are not looked at."""

    def close(self) -> None:
        """Let go of what is open."""
