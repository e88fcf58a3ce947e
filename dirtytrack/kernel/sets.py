# SPDX-License-Identifier: MIT
"""Sets of pages in C, as memoryviews: what `dirtytrack.DirtySet` is made of."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidMemory
from . import core
from .failures import raise_failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._taking import Taken
    from .core import CData

__all__ = [
    "Extent",
    "assume",
    "assumed",
    "bitmap",
    "changed",
    "clip",
    "combine",
    "contains",
    "copy_out",
    "counts",
    "equal",
    "extents",
    "from_runs",
    "gather",
    "gather_summed",
    "intersects",
    "lent",
    "nbytes",
    "new_bytes",
    "numbers",
    "offsets",
    "pages",
    "rows",
    "scatter",
    "set_of",
    "subset",
    "union_many",
    "unite",
    "view",
]


class Extent(NamedTuple):
    """A piece of tracked memory.

    ``unpinned``: it may vanish beneath a copy. ``mirror``: a pinned buffer. ``through``: a region of a session that
    compares, which then knows what was read.
    """

    address: int
    nbytes: int
    unpinned: bool
    mirror: Any = None
    through: CData | None = None


def _check(code: int, why: CData, doing: str) -> None:
    if code:
        raise_failure(code, why, doing)


# ---- numbers


def _let_go(owner: object, pointer: CData) -> None:
    """The finaliser of a pointer: all that it does is to have kept the owner until now."""


def numbers(owner: CData, pointer: CData, count: int, width: int) -> memoryview:
    """A read-only view of count x width 64-bit numbers; it keeps ``owner``."""
    shape = (count, width) if width > 1 else (count,)
    if not count:  # memoryview.cast knows no shape with a zero
        return memoryview(bytes(8 * width)).cast("B").cast("Q", (1, *shape[1:]))[:0]
    held = pointer if owner is pointer else core.ffi.gc(pointer, partial(_let_go, owner))
    return memoryview(core.ffi.buffer(held, count * width * 8)).cast("B").cast("Q", shape).toreadonly()


def view(cset: CData) -> memoryview:
    """The runs, (n, 2) start and end; copies nothing and keeps the set."""
    return numbers(cset, cset.runs, cset.count, 2)


def set_of(held: Taken | CData) -> CData:
    """The set that a Taken has in it, which keeps that; any other set as it is."""
    if isinstance(held, core.taking.Taken):
        return core.ffi.gc(core.ffi.cast("dt_set *", held.address), partial(_let_go, held))
    return held


def lent(held: Taken | CData) -> CData:
    """The same, but for as long as the caller holds ``held``."""
    return core.ffi.cast("dt_set *", held.address) if isinstance(held, core.taking.Taken) else held


def regions_view(result: CData) -> memoryview:
    """The regions of a dt_scan_result, (n, 3) start, end, categories; copies nothing and keeps the result."""
    return numbers(result, result.regions, result.count, 3)


def offsets(cset: CData, address: int, nbytes: int) -> memoryview:
    """(n, 2) byte offsets of what the set touches in [address, address + nbytes)."""
    call, null = core.lib.dt_set_offsets, core.ffi.NULL
    room = call(cset, address, nbytes, null, 0)
    out = core.ffi.new("dt_run[]", room)
    call(cset, address, nbytes, out, room)
    return numbers(out, out, room, 2)


def intersects(cset: CData, start: int, end: int) -> bool:
    return core.lib.dt_set_offsets(cset, start, end - start, core.ffi.NULL, 0) > 0


def pages(cset: CData, start: int, end: int) -> memoryview:
    """(n,) page numbers from ``start``."""
    call, null = core.lib.dt_set_pages, core.ffi.NULL
    room = call(cset, start, end, null, 0)
    out = core.ffi.new("uint64_t[]", room)
    call(cset, start, end, out, room)
    return numbers(out, out, room, 1)


def bitmap(cset: CData, start: int, end: int) -> bytes:
    """One bit a page of [start, end), least significant bit first."""
    bits = bytearray(((end - start) // core.PAGE_BYTES + 7) // 8)
    core.lib.dt_set_bitmap(cset, start, end, core.ffi.from_buffer("uint8_t[]", bits))
    return bytes(bits)


def rows(cset: CData, address: int, stride: int, row_bytes: int, count: int) -> memoryview:
    """(n,) numbers of the rows at address + i * stride that the set touches."""
    call, null = core.lib.dt_set_rows, core.ffi.NULL
    room = call(cset, address, stride, row_bytes, count, null, 0)
    out = core.ffi.new("uint64_t[]", room)
    call(cset, address, stride, row_bytes, count, out, room)
    return numbers(out, out, room, 1)


def counts(cset: CData, spans: Any, n: int) -> memoryview:
    """(n,) pages in each span of a buffer of 64-bit (start, end) pairs: page-aligned, sorted, disjoint."""
    out = core.ffi.new("uint64_t[]", n)
    source = core.ffi.from_buffer(spans)
    if core.lib.dt_set_counts(cset, core.ffi.cast("dt_run *", source), n, out):
        raise InvalidMemory("pages are counted in spans that are page-aligned, sorted, disjoint and not empty")
    return numbers(out, out, n, 1)


# ---- algebra


def assumed(cset: CData) -> CData:
    """The part that was told without having been watched."""
    out = core.new_set()
    _check(core.lib.dt_set_copy(cset.assumed, cset.assumed_count, out), out.why, "make a set of what was assumed")
    out.epoch, out.complete = cset.epoch, cset.complete
    return out


def assume(cset: CData, *sources: CData) -> CData:
    """The set, in which is noted what of it was assumed in any of the sources."""
    parts = [(source.assumed, source.assumed_count) for source in sources if source.assumed_count]
    if len(parts) > 1:
        whole = union_many([assumed(source) for source in sources if source.assumed_count])
        parts = [(whole.runs, whole.count)]
    for runs, count in parts:
        _check(core.lib.dt_set_assume(cset, runs, count), None, "note what was assumed")
    return cset


def from_runs(runs: Any, count: int, *, epoch: int = 0, complete: bool = True, assumed: bytes = b"") -> CData:
    """A set of the runs in a buffer of 64-bit (start, end) pairs: page-aligned, sorted, disjoint."""
    out = core.new_set()
    source = core.ffi.cast("dt_run *", core.ffi.from_buffer(runs)) if count else core.ffi.NULL
    _check(core.lib.dt_set_copy(source, count, out), out.why, "make a set of these runs")
    out.epoch, out.complete = epoch, complete
    if assumed:
        part = from_runs(assumed, len(assumed) // 16)
        _check(core.lib.dt_set_assume(out, part.runs, part.count), None, "note what was assumed")
    return out


def combine(how: str, a: CData, b: CData) -> CData:
    """``union``, ``intersection`` or ``difference`` of two sets."""
    out = core.new_set()
    _check(getattr(core.lib, "dt_set_" + how)(a, b, out), out.why, "combine sets")
    return assume(out, a, b)


def unite(a: CData, b: CData) -> CData:
    """`combine` for the union alone, in fewer steps."""
    out = core.new_set()
    code = core.lib.dt_set_union(a, b, out)
    if code:
        raise_failure(code, out.why, "unite sets")
    return assume(out, a, b) if a.assumed_count or b.assumed_count else out


def union_many(sets: Sequence[CData]) -> CData:
    out = core.new_set()
    array = core.ffi.new("dt_set *[]", list(sets))
    _check(core.lib.dt_set_union_many(array, len(array), out), out.why, "unite sets")
    return out if not any(each.assumed_count for each in sets) else assume(out, *sets)


def clip(cset: CData, start: int, end: int) -> CData:
    out = core.new_set()
    _check(core.lib.dt_set_clip(cset, start, end, out), out.why, "clip a set")
    return assume(out, cset)


def equal(a: CData, b: CData) -> bool:
    return bool(core.lib.dt_set_equal(a, b))


def subset(a: CData, b: CData) -> bool:
    return bool(core.lib.dt_set_subset(a, b))


def contains(cset: CData, address: int) -> bool:
    return bool(core.lib.dt_set_contains(cset, address))


# ---- bytes


def extents(pieces: Sequence[Extent]) -> CData:
    """The pieces as a C array. The caller keeps the mirrors."""
    out = core.ffi.new("dt_extent[]", len(pieces))
    null = core.ffi.NULL
    for i, piece in enumerate(pieces):
        mirror, through = (null if each is None else each for each in (piece.mirror, piece.through))
        out[i] = (piece.address, piece.nbytes, mirror, piece.unpinned, 0, through)
    return out


def new_bytes(nbytes: int) -> CData:
    """Memory for ``nbytes`` bytes, not zeroed."""
    return core.ffi.new_allocator(should_clear_after_alloc=False)("uint8_t[]", nbytes)


def nbytes(cset: CData, pieces: CData) -> int:
    return core.lib.dt_set_nbytes(cset, pieces, len(pieces))


def gather(cset: CData, pieces: CData, out: CData, room: int) -> None:
    why = core.new_failure()
    _check(core.lib.dt_gather(cset, pieces, len(pieces), out, room, why), why, "gather the dirty bytes")


def gather_summed(cset: CData, pieces: CData, out: CData, room: int) -> Sequence[int]:
    """As `gather`; of what came from each piece its XXH64."""
    why, sums = core.new_failure(), core.ffi.new("uint64_t[]", len(pieces))
    code = core.lib.dt_gather_summed(cset, pieces, len(pieces), out, room, sums, why)
    _check(code, why, "gather the dirty bytes")
    return list(sums)


def scatter(cset: CData, pieces: CData, data: CData) -> None:
    why = core.new_failure()
    _check(core.lib.dt_scatter(cset, pieces, len(pieces), data, len(data), why), why, "scatter the dirty bytes")


def copy_out(cset: CData, pieces: CData) -> None:
    why = core.new_failure()
    _check(core.lib.dt_copy_out(cset, pieces, len(pieces), why), why, "copy the dirty bytes")


def changed(cset: CData, pieces: CData, granule_bytes: int) -> CData:
    out = core.new_set()
    code = core.lib.dt_changed(cset, pieces, len(pieces), granule_bytes, out)
    _check(code, out.why, "compare with the mirror")
    return assume(out, cset)
