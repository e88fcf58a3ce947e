# SPDX-License-Identifier: MIT
"""Regions: named spans of bytes, the pages around them, and what cannot be seen of them."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import BlindSpotWarning, GuardPageWarning, InvalidMemory
from .kernel import core, engine, failures, mappings
from .kernel.abi import Address
from .memory import Pinned, pin

if TYPE_CHECKING:
    from .memory import AnyBuffer, Memory

__all__ = ["Region", "Run", "Span", "Survey", "guarded", "range_of", "survey", "unseen", "warn"]

DMA = "DMA in flight"
OTHER_WRITERS = "writes through a descriptor, another process, or a mapping made after the registration"
OTHER_MAPPINGS = "writes through another mapping of it in this process, which another userfaultfd has"
FILE_BENEATH = "the file changing beneath pages that were never written"
REREAD = "pages discarded and there again, by a read or in a large folio, before the next collect"
REWRITTEN = (
    "bytes changed after a collect and changed back before the next, where the program itself read them in between"
)
REREAD_BY_DESCRIPTOR = "holes punched or truncated through a descriptor and there again before the next collect"


class Run(NamedTuple):
    """A run of pages: addresses, half-open."""

    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.end - self.start


class Span:
    """The numbers of a region, which outlive it; shared by all sets that know the region."""

    __slots__ = (
        "address",
        "compared_by",
        "dtype",
        "end",
        "granule_bytes",
        "id",
        "name",
        "nbytes",
        "owner",
        "pid",
        "shape",
        "start",
        "unpinned",
    )

    def __init__(
        self,
        id: int,
        name: str,
        address: int,
        nbytes: int,
        start: int,
        end: int,
        granule_bytes: int,
        unpinned: bool,
        shape: tuple[int, ...] | None,
        dtype: str | None,
    ) -> None:
        self.id, self.name, self.address, self.nbytes = id, name, address, nbytes
        self.granule_bytes, self.unpinned, self.shape, self.dtype = granule_bytes, unpinned, shape, dtype
        self.start, self.end = start, end
        self.owner: weakref.ref[Region] | None = None
        self.pid = 0  # of another process, whose memory it is
        self.compared_by = 0  # the number of the session that compares it, where one does

    def __reduce__(self) -> tuple[object, ...]:
        numbers = (
            self.id,
            self.name,
            self.address,
            self.nbytes,
            self.start,
            self.end,
            self.granule_bytes,
            self.unpinned,
            self.shape,
            self.dtype,
        )
        return Span, numbers


class Region:
    """``[address, address + nbytes)``, the bytes that the user gave, registered in a session; made by `register`.

    Its page span ``[start, end)`` rounds outward to ``granule_bytes``. A Region is bound to its registration: the same
    memory registered again is another Region.
    """

    __slots__ = ("__weakref__", "_blind_spots", "_ended", "_handle", "_hold", "_memory", "_slot", "_span")

    def __init__(
        self, span: Span, blind_spots: frozenset[str], slot: Any, hold: Any, memory: Memory | None = None
    ) -> None:
        self._span = span
        self._blind_spots = blind_spots
        self._memory = memory  # what `allocate` made, where it is that; it may be resized
        self._slot = slot
        self._handle = slot[0]
        self._hold = hold
        self._ended = ""  # how: "unregistered" or "closed"
        span.owner = weakref.ref(self)

    @property
    def name(self) -> str:
        """As given, else the memory's own, else ``region N``."""
        return self._span.name

    @property
    def address(self) -> Address:
        """Where the user's bytes begin."""
        return Address(self._span.address)

    @property
    def nbytes(self) -> int:
        """How many bytes the user gave."""
        return self._span.nbytes

    @property
    def start(self) -> Address:
        """Where the page span begins."""
        return Address(self._span.start)

    @property
    def end(self) -> Address:
        """Where the page span ends."""
        return Address(self._span.end)

    @property
    def granule_bytes(self) -> int:
        """What the kernel resolves for this memory: the base page, or a huge page."""
        return self._span.granule_bytes

    @property
    def page_count(self) -> int:
        """Base pages in the page span."""
        return (self._span.end - self._span.start) // core.PAGE_BYTES

    @property
    def arm(self) -> str:
        """Which pages are armed: ``all``, unpopulated ones too, or ``present``, what is populated.

        ``present`` is for large, mostly empty reservations of private anonymous memory: armed pages that are not
        populated take 2 MiB of page tables a GiB, make fork() slow and keep huge pages away (Linux 6.18). Each collect
        looks a second time instead, for pages that were discarded.
        """
        return engine.about(self._handle).arm

    @property
    def aliases(self) -> int:
        """How many other mappings of the same shared memory this process had when it was registered; a write through
        any of them is reported here too."""
        return engine.about(self._handle).aliases

    @property
    def blind_spots(self) -> frozenset[str]:
        """The ways to write this kind of memory that no page table sees; declare such writes by `mark_dirty`."""
        return self._blind_spots

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The array's shape, where the buffer tells."""
        return self._span.shape

    @property
    def dtype(self) -> str | None:
        """The items' format in the buffer protocol's words (``d``, ``<i4``, …), where the buffer tells."""
        return self._span.dtype

    def _end(self, how: str) -> None:
        """The session let go of it: let go of the buffer. A copy that runs in another thread holds it itself."""
        self._ended = self._ended or how
        self._hold = self._memory = None

    @property
    def registered(self) -> bool:
        """Whether the session still has it."""
        return engine.registered(self._handle)

    def __repr__(self) -> str:
        state = "" if self.registered else ", unregistered"
        return f"<Region {self.name!r} of {self.nbytes} bytes at {self.address:#x}{state}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Region cannot be pickled: it belongs to this process's memory")


class Survey(NamedTuple):
    """What kind of memory lies in a span."""

    blind_spots: frozenset[str]
    unpinned: bool
    """It may vanish beneath a copy, so copies must be fault-safe."""
    others_write: str
    """Who else may write it, in words; empty where nobody can."""
    start: int
    end: int
    """Of the pages that it touches."""


def survey(memory: Pinned, *, events: bool = False) -> Survey:
    """Look at the mappings beneath a buffer.

    Args:
        memory: the bytes.
        events: whether the kernel tells of discards by itself.

    Raises:
        InvalidMemory: nothing is mapped at part of it.
        PermissionDenied, LimitReached: /proc/self/maps cannot be read.
    """
    page = core.PAGE_BYTES
    start = memory.address - memory.address % page
    end = -(-(memory.address + memory.nbytes) // page) * page
    sealed = memory.memory is not None
    reread = REREAD_BY_DESCRIPTOR if events else REREAD
    spots = {DMA}
    unpinned = memory.hold is None
    others = ""
    at = start
    try:
        for mapping in mappings.mappings(start, end):
            if mapping.start > at:
                break
            at = mapping.end
            kind = mapping.kind
            if kind == "anonymous":
                continue
            if kind == "hugetlb" and not mapping.shared:
                if not events:
                    spots.add(REREAD)
                continue
            spots.update((OTHER_WRITERS, reread) if mapping.shared else (FILE_BENEATH, reread))
            unpinned = unpinned or not (sealed or mapping.name.startswith("/dev/zero"))
            others = f"{'shared' if mapping.shared else 'private'} mapping {mapping}"
    except OSError as error:
        raise failures.unreadable_maps(error, start, end) from error
    if at < end:
        raise InvalidMemory(
            f"cannot register the memory {failures.describe(start, end)}: nothing is mapped at {at:#x}",
            start=at,
            end=end,
        )
    return Survey(frozenset(spots), unpinned, others, start, end)


def range_of(memory: Region | Run | AnyBuffer | tuple[int, int], what: str) -> tuple[int, int, Any]:
    """The bytes [start, end) that a region, run, buffer or (address, nbytes) pair names, and what holds them.

    Raises:
        InvalidMemory: it is none of these.
    """
    if isinstance(memory, Region):
        return memory.address, memory.address + memory.nbytes, memory
    if isinstance(memory, Run):
        if not 0 <= memory.start < memory.end:
            raise InvalidMemory(f"this {what} is empty or reversed: {memory}")
        return memory.start, memory.end, None
    pinned = pin(memory, what=what, writable=False)
    return pinned.address, pinned.address + pinned.nbytes, pinned.hold


# ---- warnings


def unseen(name: str | None, others: str, spots: frozenset[str]) -> BlindSpotWarning:
    """What is told of memory that others may write."""
    return BlindSpotWarning(
        f"{repr(name) if name else 'this memory'} can be written unseen: it is a {others}. No page table of this "
        f"process shows: {'; '.join(sorted(spots))}. Declare such writes by session.mark_dirty(), and pass "
        "blind_spots='accepted' once they are taken care of"
    )


def guarded(name: str | None, others: str, guards: int) -> GuardPageWarning:
    """What is told of such memory that has guard pages."""
    return GuardPageWarning(
        f"{repr(name) if name else 'this memory'} has guard pages, {guards} of them, and is a {others}. While it is "
        "tracked, madvise(MADV_GUARD_INSTALL) of any other page of it may never return (seen on Linux 6.16 to 7.3): "
        "whoever owns it must not add guard pages then"
    )


def warn(warning: UserWarning, strict: bool, stacklevel: int) -> None:
    """Warn, or raise it where it is to be strict."""
    if strict:
        raise warning
    warnings.warn(warning, stacklevel=stacklevel)
