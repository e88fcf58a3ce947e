# SPDX-License-Identifier: MIT
"""What one collect found: an immutable set of pages, and the bytes in them that belong to its regions."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from .errors import InvalidMemory
from .kernel import core, sets
from .layout import Layout, mirrors, pinned_extents
from .memory import pin
from .region import Region, Run

if TYPE_CHECKING:
    from .memory import AnyBuffer

    Mirror = AnyBuffer | tuple[int, int] | Mapping[Region, AnyBuffer] | Mapping[str, AnyBuffer]

__all__ = ["DirtySet", "Run"]

_NO_LAYOUT = Layout(())


class DirtySet:
    """Pages that were written in an epoch: a superset of what was written, never less.

    Made by `DirtyTracker.collect` and its kin, and by algebra. Immutable; ``runs``, ``page_count``, bitmaps and algebra
    are whole pages, while ``nbytes``, ``offsets``, ``gather``, ``scatter``, ``copy_to`` and ``changed`` are clipped to
    the regions' own bytes, each byte once. Holds numbers and weak handles of its regions: after `unregister` or
    `close`, what reads memory raises. It can be pickled; what comes back knows numbers only.

    Thread safety: everything may be called from any thread at any time.
    """

    __slots__ = ("__weakref__", "_held", "_layout", "_runs")

    _held: Any  # the C set, or the object that has it in it
    _layout: Layout
    _runs: memoryview

    def __init__(self, cset: Any = None, layout: Layout = _NO_LAYOUT) -> None:
        if cset is None:
            core.load()
            cset = sets.from_runs(b"", 0)
        self._held = cset
        self._layout = layout

    @property
    def _set(self) -> Any:
        """The C set. A collect makes none of cffi's objects for it: whoever first asks does."""
        self._held = cset = sets.set_of(self._held)
        return cset

    @property
    def _lent(self) -> Any:
        """The C set, for as long as the caller holds this object: faster than ``_set`` for who needs it once."""
        return sets.lent(self._held)

    # ---- what is in it

    @property
    def runs(self) -> memoryview:
        """Read-only, format ``Q``, shape (n, 2): sorted, disjoint, coalesced [start, end) addresses; not a copy."""
        try:
            return self._runs
        except AttributeError:
            self._runs = sets.view(self._set)
            return self._runs

    @property
    def page_count(self) -> int:
        """Base pages."""
        return int(self._set.pages)

    @property
    def nbytes(self) -> int:
        """The regions' own bytes in these pages, each once."""
        return sets.nbytes(self._set, self._layout.extents)

    @property
    def page_span_bytes(self) -> int:
        """The pages' bytes, other owners' on boundary pages included."""
        return int(self._set.pages) * core.PAGE_BYTES

    @property
    def epoch(self) -> int:
        """The epoch that the collect closed; of a union the latest; 0 of none."""
        return int(self._set.epoch)

    @property
    def complete(self) -> bool:
        """False where a time budget ended the collect early: the rest is pending still.

        It is about that one collect. A loop ``until complete`` over memory that is written meanwhile may never end:
        give it an end of its own, or collect the last part without a budget.
        """
        return bool(self._set.complete)

    @property
    def assumed(self) -> DirtySet:
        """The part that was reported without having been watched: blocks that are rewritten so densely, and pages that
        are rewritten in so many epochs, that the faults would cost more. Empty unless a tracker of this memory is
        adaptive, and none of them exact."""
        part = self._like(sets.assumed(self._set))
        sets.assume(part._set, self._set)
        return part

    def __len__(self) -> int:
        return int(self._set.count)

    def __bool__(self) -> bool:
        return bool(self._set.count)

    def __iter__(self) -> Iterator[Run]:
        numbers = iter(self.runs.cast("B").cast("Q")) if self._set.count else iter(())
        return map(Run, numbers, numbers)

    def __contains__(self, address: object) -> bool:
        try:
            number = operator.index(address)  # type: ignore[arg-type]
        except TypeError:
            return False
        return 0 <= number < 1 << 64 and sets.contains(self._set, number)

    def __repr__(self) -> str:
        rest = "" if self.complete else ", incomplete"
        return f"<DirtySet of epoch {self.epoch}: {self.page_count} pages in {len(self)} runs{rest}>"

    @staticmethod
    def from_runs(runs: AnyBuffer | Iterable[tuple[int, int]], *, epoch: int = 0) -> DirtySet:
        """A set of these runs, which knows numbers only: what was recorded, or told by somebody else.

        Args:
            runs: [start, end) addresses, page-aligned, sorted and disjoint: pairs, or a buffer of 64-bit numbers as
                ``runs`` of another set is.
            epoch: what ``epoch`` of the new set says.

        Raises:
            InvalidMemory: they are not so.
        """
        core.load()
        packed, count = _pairs(runs)
        return DirtySet(sets.from_runs(packed, count, epoch=epoch))

    # ---- where

    def page_counts(self, spans: AnyBuffer | Iterable[tuple[int, int]]) -> memoryview:
        """How many of its pages are in each of n spans of addresses: (n,). One pass in C.

        Args:
            spans: as ``runs`` of `from_runs`; spans may touch.

        Raises:
            InvalidMemory: they are not page-aligned, sorted and disjoint.
        """
        packed, count = _pairs(spans)
        return sets.counts(self._set, packed, count)

    def in_region(self, region: Region | str) -> DirtySet:
        """The part in a region's page span; its bytes are clipped to that region.

        Raises:
            InvalidMemory: this set knows nothing of that region.
        """
        span = self._layout.find(region)
        return DirtySet(sets.clip(self._set, span.start, span.end), Layout((span,)))

    def offsets(self, region: Region | str | None = None) -> memoryview:
        """Byte offsets into a region, (n, 2), half-open, of what is dirty.

        Args:
            region: or its name; may be left out where the set has one region only.

        Raises:
            InvalidMemory: this set knows nothing of that region.
        """
        span = self._layout.find(region)
        return sets.offsets(self._set, span.address, span.nbytes)

    def pages(self, region: Region | str | None = None) -> memoryview:
        """Indexes of dirty pages, (n,), counted from the start of a region's page span. Raises like `offsets`."""
        span = self._layout.find(region)
        return sets.pages(self._set, span.start, span.end)

    def bitmap(self, region: Region | str | None = None) -> bytes:
        """One bit a page of a region's page span, least significant bit first. Raises like `offsets`."""
        span = self._layout.find(region)
        return sets.bitmap(self._set, span.start, span.end)

    def rows(self, array: Region | str | AnyBuffer) -> memoryview:
        """Indexes along an array's first axis of the rows that a dirty page touches, (n,).

        Args:
            array: a tracked array, or part of one; a region (or its name) whose buffer told its shape.

        Raises:
            InvalidMemory: it has no rows, is not one of this set's regions, or runs backwards.
        """
        if isinstance(array, (Region, str)):
            span = self._layout.find(array)
            if not span.shape:
                raise InvalidMemory(f"region {span.name!r} has no rows: its buffer told no shape")
            row_bytes = span.nbytes // span.shape[0]
            return sets.rows(self._set, span.address, row_bytes, row_bytes, span.shape[0])
        address, count, stride, row_bytes = _rows_of(array)
        if not count or not row_bytes:
            return sets.rows(self._set, address, 1, 1, 0)
        self._layout.require(address, address + (count - 1) * stride + row_bytes, "this array")
        return sets.rows(self._set, address, stride, row_bytes, count)

    # ---- algebra

    def _like(self, cset: Any) -> DirtySet:
        return DirtySet(cset, self._layout)

    def _combine(self, how: str, other: DirtySet) -> DirtySet:
        return DirtySet(sets.combine(how, self._set, other._set), self._layout.merged(other._layout))

    def __or__(self, other: DirtySet) -> DirtySet:
        if not isinstance(other, DirtySet):
            return NotImplemented
        return self._combine("union", other)

    def __and__(self, other: DirtySet) -> DirtySet:
        if not isinstance(other, DirtySet):
            return NotImplemented
        return self._combine("intersection", other)

    def __sub__(self, other: DirtySet) -> DirtySet:
        if not isinstance(other, DirtySet):
            return NotImplemented
        return self._combine("difference", other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtySet):
            return NotImplemented
        return sets.equal(self._set, other._set)

    def __le__(self, other: DirtySet) -> bool:
        if not isinstance(other, DirtySet):
            return NotImplemented
        return sets.subset(self._set, other._set)

    def __ge__(self, other: DirtySet) -> bool:
        if not isinstance(other, DirtySet):
            return NotImplemented
        return sets.subset(other._set, self._set)

    def __hash__(self) -> int:
        cset = self._set
        ends = (cset.runs[0].start, cset.runs[cset.count - 1].end) if cset.count else ()
        return hash((cset.count, cset.pages, ends))

    @staticmethod
    def union(dirty_sets: Iterable[DirtySet]) -> DirtySet:
        """The union of any number of sets, in one pass. Of none: an empty set that knows no region."""
        parts = list(dirty_sets)
        for part in parts:
            if not isinstance(part, DirtySet):
                raise TypeError(f"a DirtySet is united with DirtySets, not with a {type(part).__name__}")
        if not parts:
            return DirtySet()
        layout = parts[0]._layout
        for part in parts[1:]:
            layout = layout.merged(part._layout)
        return DirtySet(sets.union_many([part._set for part in parts]), layout)

    # ---- bytes

    def gather(self, out: AnyBuffer | None = None) -> memoryview:
        """Read the dirty bytes, packed in the order of their addresses.

        Args:
            out: a writable buffer of at least ``nbytes``; left out, a new one is made.

        Returns:
            A view of the ``nbytes`` that were written into ``out``.

        Raises:
            InvalidMemory: ``out`` is too small or lies in the memory itself.
            NotRegistered: a region was unregistered or its session closed; or this set was unpickled.
            RegionGone: a page vanished beneath the copy.
        """
        extents, holds = pinned_extents(self._layout, self._set)
        room = sets.nbytes(self._set, extents)
        if out is None:
            target = sets.new_bytes(room)
            result = core.view_of(target, room) if room else memoryview(bytearray())
        else:
            target, address, length = _writable(out)
            if length < room:
                raise InvalidMemory(f"the output has {length} bytes, the set has {room}: see DirtySet.nbytes")
            self._layout.refuse_overlap(address, address + length, "the output")
            result = core.view_of(target, room)
        sets.gather(self._set, extents, target, room)
        del holds
        return result

    def scatter(self, data: AnyBuffer) -> None:
        """Write bytes as `gather` gave them back to where they came from. What is written is dirty again.

        Args:
            data: exactly ``nbytes`` bytes.

        Raises:
            InvalidMemory: ``data`` has another length.
            NotRegistered, RegionGone: as for `gather`; bytes before the vanished page are written.
        """
        extents, holds = pinned_extents(self._layout, self._set)
        room = sets.nbytes(self._set, extents)
        if not room and not memoryview(data).nbytes:  # type: ignore[arg-type]
            return
        source = pin(data, what="data", writable=False)
        if source.nbytes != room:
            raise InvalidMemory(f"the data has {source.nbytes} bytes, the set has {room}")
        bytes_in = source.hold
        if bytes_in is None:
            raise InvalidMemory("scatter() takes its data as a buffer, not as (address, nbytes)")
        sets.scatter(self._set, extents, bytes_in)
        del holds

    def copy_to(self, mirror: Mirror) -> None:
        """Copy the dirty bytes to the same offsets of a mirror.

        Args:
            mirror: a writable buffer as long as the only region; or a mapping from regions or their names to such,
                that names every region with something dirty.

        Raises:
            InvalidMemory: a mirror is missing, of another length, or overlaps tracked memory or another mirror.
            NotRegistered, RegionGone: as for `gather`.
        """
        extents, holds = mirrors(self._layout, mirror, cset=self._set, writable=True)
        sets.copy_out(self._set, extents)
        del holds

    def changed(self, mirror: Mirror, granule: int | None = None) -> DirtySet:
        """The part whose bytes really differ from a mirror.

        Args:
            mirror: as for `copy_to`; it may be read-only.
            granule: answer in blocks of this many bytes, a multiple of the page; the page where left out.

        Raises:
            InvalidMemory: as for `copy_to`, or the granule is not a multiple of the page.
            NotRegistered, RegionGone: as for `gather`.
        """
        granule_bytes = core.PAGE_BYTES if granule is None else operator.index(granule)
        if granule_bytes <= 0 or granule_bytes % core.PAGE_BYTES:
            raise InvalidMemory(f"the granule is a multiple of {core.PAGE_BYTES} bytes, not {granule_bytes}")
        extents, holds = mirrors(self._layout, mirror, cset=self._set, writable=False)
        found = sets.changed(self._set, extents, granule_bytes)
        del holds
        return self._like(found)

    # ---- pickling

    def __reduce__(self) -> tuple[object, ...]:
        assumed = self.assumed.runs.tobytes()
        return _unpickled, (self.runs.tobytes(), self.epoch, self.complete, self._layout.spans, assumed)


def _unpickled(runs: bytes, epoch: int, complete: bool, spans: tuple[Any, ...], assumed: bytes) -> DirtySet:
    core.load()
    cset = sets.from_runs(runs, len(runs) // 16, epoch=epoch, complete=complete, assumed=assumed)
    return DirtySet(cset, Layout(spans))


def _pairs(runs: Any) -> tuple[Any, int]:
    """(a buffer of 64-bit numbers, how many pairs) of runs."""
    try:
        view = memoryview(runs)
    except TypeError:
        try:
            view = memoryview(array("Q", chain.from_iterable(runs)))
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidMemory(f"runs are pairs of addresses, or a buffer of 64-bit numbers: {error}") from error
    if view.itemsize != 8 or view.nbytes % 16 or not view.c_contiguous:
        raise InvalidMemory(
            f"runs are pairs of 64-bit numbers, one after the other; this buffer has {view.nbytes} bytes in items of "
            f"{view.itemsize}"
        )
    return view, view.nbytes // 16


def _writable(out: Any) -> tuple[Any, int, int]:
    """(pointer that holds it, address, bytes) of an output buffer, at a third of what `pin` takes."""
    try:
        hold = core.pin(out, writable=True)
    except (TypeError, ValueError, BufferError):
        hold = None
    if hold is None or not len(hold):  # empty, or no plain buffer: `pin` knows the other kinds, and says what is wrong
        pinned = pin(out, what="output")
        hold = pinned.hold if pinned.hold is not None else core.pointer_to(pinned.address)
        return hold, pinned.address, pinned.nbytes
    return hold, core.address_of(hold), len(hold)


def _rows_of(array: Any) -> tuple[int, int, int, int]:
    """(address, rows, bytes from row to row, bytes a row spans) of an array, along its first axis."""
    interface = getattr(array, "__array_interface__", None)
    if interface is not None and interface.get("shape") and hasattr(array, "itemsize"):
        shape, item = interface["shape"], array.itemsize
        strides = interface.get("strides") or _c_strides(shape, item)
        address = interface["data"][0]
    else:
        pinned = pin(array, what="array", writable=False)
        if not pinned.shape or not pinned.shape[0]:
            raise InvalidMemory("this array has no rows: it has no first axis")
        shape, address = pinned.shape, pinned.address
        item = pinned.nbytes
        for length in shape:
            item //= length
        strides = _c_strides(shape, item)
    if any(stride < 0 for stride in strides):
        raise InvalidMemory("this array runs backwards (a negative stride): ask for the array that it is a view of")
    if 0 in shape:
        return address, 0, 1, 0
    row_bytes = item + sum((length - 1) * stride for length, stride in zip(shape[1:], strides[1:], strict=True))
    if shape[0] > 1 and not strides[0]:
        raise InvalidMemory("this array repeats one row (a stride of 0): ask for the array that it is a view of")
    return address, shape[0], strides[0] or row_bytes, row_bytes


def _c_strides(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    strides = [item] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
