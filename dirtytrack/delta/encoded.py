# SPDX-License-Identifier: MIT
"""Deltas: the changed bytes of a memory, as `diff` finds them and `apply` writes them. See docs/delta-format.md."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Literal

from ..dirtyset import DirtySet
from ..errors import InvalidDelta, InvalidMemory, PermissionDenied, UnsupportedKernel
from ..kernel import core, deltas, sets
from ..layout import Layout, held, mirrors, read_through
from ..memory import Memory, Pinned, pin
from ..region import Region, survey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..memory import AnyBuffer

    Source = Region | AnyBuffer | tuple[int, int]

__all__ = ["Delta", "apply", "compose", "diff", "itemsize_and_shape", "require_question"]

VERSION = 1
_MAGIC = b"DTD"
_COMPRESSED = 1
_MOST_GRANULE = 4096


class Delta:
    """Which bytes of a memory changed, and what they are now. Immutable.

    Made by `diff`, `compose`, `Mirror.update` and `Delta.from_bytes`. Offsets count from the memory's first byte. True
    where anything changed. Iterating gives ``(offset, bytes)``: the bytes are a read-only view into the delta, and a
    run that crosses a block of 4096 bytes comes in parts; ``len()`` is how many there are.

    Thread safety: everything may be called from any thread.
    """

    __slots__ = ("__weakref__", "_bytes", "_info", "_nbytes", "_sealed")

    def __init__(self, memory: Any, nbytes: int, *, sealed: bool) -> None:
        self._bytes, self._nbytes, self._sealed = memory, nbytes, sealed
        self._info: deltas.Info | None = None

    @staticmethod
    def from_bytes(data: AnyBuffer, *, target_nbytes: int | None = None) -> Delta:
        """Read an encoding, compressed or not; all of it is checked.

        Args:
            data: the bytes. They are not copied unless they are compressed: do not change them while the delta is used.
            target_nbytes: refuse a delta for a memory of another length. For compressed bytes of unknown origin: they
                are never decompressed to more than a delta for a memory of that length can have.

        Raises:
            InvalidDelta: no delta, damaged, cut short, or of another version.
            InvalidMemory: for a memory of another length.
            UnsupportedKernel: it is compressed, and the package zstandard is not installed.
        """
        core.load()
        try:
            bytes_in = core.pin(data, writable=False)
        except (TypeError, ValueError, BufferError) as error:
            raise InvalidDelta(f"a delta is read from a contiguous buffer of bytes: {error}") from error
        head = bytes(core.view_of(bytes_in, min(len(bytes_in), deltas.HEADER_BYTES)))
        if len(head) < deltas.HEADER_BYTES or head[:3] != _MAGIC:
            raise InvalidDelta(f"these {len(bytes_in)} bytes are no delta: they do not begin as one")
        if head[3] != VERSION:
            raise InvalidDelta(f"this delta is of version {head[3]}, this library reads version {VERSION}")
        if deltas.checksum(bytes_in, len(bytes_in)) != head[16:24]:
            raise InvalidDelta(f"this delta of {len(bytes_in)} bytes is damaged: its checksum is another. Get it again")
        _require_target(int.from_bytes(head[8:16], "little"), target_nbytes)
        if head[5] == _COMPRESSED:
            bytes_in = _decompressed(core.view_of(bytes_in, len(bytes_in)), head)
        delta = Delta(bytes_in, len(bytes_in), sealed=True)
        delta._info = deltas.check(bytes_in, len(bytes_in))
        return delta

    # ---- what it is

    def _about(self) -> deltas.Info:
        if self._info is None:
            self._info = deltas.check(self._bytes, self._nbytes)
        return self._info

    @property
    def nbytes(self) -> int:
        """Of the encoding: at most the dirty pages and 1 %."""
        return self._nbytes

    @property
    def changed_nbytes(self) -> int:
        """Of the changed granules."""
        return self._about().changed_bytes

    @property
    def target_nbytes(self) -> int:
        """Of the memory that it changes."""
        return int.from_bytes(core.view_of(self._bytes, self._nbytes)[8:16], "little")

    @property
    def granule(self) -> int:
        """Bytes that are changed or not as one."""
        return 1 << core.view_of(self._bytes, self._nbytes)[4]

    @property
    def data(self) -> memoryview:
        """The encoding, read-only, not copied: what `Delta.from_bytes` takes. The first look computes its checksum."""
        if not self._sealed:
            deltas.seal(self._bytes, self._nbytes)
            self._sealed = True
        return core.view_of(self._bytes, self._nbytes).toreadonly()

    def __bytes__(self) -> bytes:
        return bytes(self.data)

    def __bool__(self) -> bool:
        return self._nbytes > deltas.HEADER_BYTES

    def __len__(self) -> int:
        return self._about().pieces

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        data = core.view_of(self._bytes, self._nbytes).toreadonly()
        count = len(pieces := deltas.pieces(self._bytes, self._nbytes))
        numbers = iter(pieces.cast("B").cast("Q")) if count else iter(())
        for offset, nbytes, at in zip(numbers, numbers, numbers, strict=True):
            yield offset, data[at : at + nbytes]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delta):
            return NotImplemented
        return self.data == other.data

    def __hash__(self) -> int:
        return hash(bytes(self.data[:24]))  # with the checksum

    def __repr__(self) -> str:
        return (
            f"<Delta of {self.nbytes} bytes: {self.changed_nbytes} of {self.target_nbytes} changed, by granules of "
            f"{self.granule}>"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return Delta.from_bytes, (bytes(self.data),)

    # ---- what changed

    def changed(
        self,
        array: Any,
        what: Literal["elements", "rows", "mask"] = "elements",
        *,
        offset: int | None = None,
    ) -> memoryview:
        """Exactly which elements of an array changed.

        Args:
            array: the memory, or another of its shape and type; its bytes are not looked at. A C-contiguous buffer, or
                a tensor of PyTorch on the CPU.
            what: ``"elements"``: flat indexes of the changed elements. ``"rows"``: indexes along the first axis of the
                rows in which any changed. ``"mask"``: one bool an element, in the array's shape.
            offset: where in the memory the array begins, in bytes, where it is a part of it.

        Returns:
            Indexes as format ``Q``, shape (n,), in order; a mask as format ``?``. ``numpy.asarray`` of it is no copy.

        Raises:
            InvalidMemory: the array is not of the delta's length (or, with an offset, does not lie in it); or a granule
                may hold bytes of two elements, so that it is not known which changed: diff with a smaller one.
        """
        itemsize, shape = itemsize_and_shape(array)
        nbytes = itemsize
        for length in shape:
            nbytes *= length
        begin = 0 if offset is None else operator.index(offset)
        if offset is None and nbytes != self.target_nbytes:
            raise InvalidMemory(
                f"this array has {nbytes} bytes, the delta is for {self.target_nbytes}: for a part, pass offset="
            )
        if not 0 <= begin <= self.target_nbytes - nbytes:
            raise InvalidMemory(
                f"an array of {nbytes} bytes at {begin} is not in the {self.target_nbytes} of the delta"
            )
        if what == "rows":
            if not shape:
                raise InvalidMemory("this array has no rows: it has no first axis")
            itemsize = nbytes // shape[0]
        else:
            require_question(what)
        if itemsize % self.granule or begin % self.granule:
            least = (itemsize | begin) & -(itemsize | begin)
            raise InvalidMemory(
                f"granules of {self.granule} bytes do not tell which {what} of {itemsize} bytes changed: diff with "
                f"granule={least}"
            )
        count = nbytes // itemsize
        if what != "mask":
            return deltas.rows(self._bytes, self._nbytes, begin, itemsize, count)
        marks: Any = deltas.rows(self._bytes, self._nbytes, begin, itemsize, count, bytearray(count))
        mask: memoryview = marks.cast("?", shape) if len(shape) > 1 else marks.cast("?")
        return mask

    # ---- compressed

    def compressed(self, level: int = 3) -> bytes:
        """The encoding with an entropy coder behind it: zstd, by the package zstandard (``dirtytrack[zstd]``).

        Args:
            level: of zstd.

        Returns:
            What `Delta.from_bytes` takes; the plain encoding where that is smaller.

        Raises:
            UnsupportedKernel: zstandard is not installed.
        """
        plain = self.data
        head, body = plain[: deltas.HEADER_BYTES], plain[deltas.HEADER_BYTES :]
        frame = _zstandard().ZstdCompressor(level=level, write_content_size=True).compress(body)
        out = bytearray(head) + len(body).to_bytes(8, "little") + frame
        if len(out) >= len(plain):
            return bytes(plain)
        out[5] = _COMPRESSED
        deltas.seal(core.pin(out, writable=True), len(out))
        return bytes(out)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedKernel(
            "compressed deltas need the package zstandard, which is not installed: pip install dirtytrack[zstd]",
            feature="zstandard",
        ) from error
    return zstandard


def _decompressed(data: memoryview, head: bytes) -> Any:
    """The plain encoding of a compressed one. What it says of its length is checked before memory is taken for it."""
    zstandard, size = _zstandard(), deltas.HEADER_BYTES
    target, nbytes = int.from_bytes(head[8:16], "little"), int.from_bytes(data[size : size + 8], "little")
    frame = data[size + 8 :]
    try:
        told = zstandard.get_frame_parameters(frame).content_size
        if told != nbytes or nbytes > most_nbytes(target) - size:
            raise InvalidDelta(
                f"this compressed delta says that it has {nbytes} bytes, its frame says {told}: for a memory of "
                f"{target} bytes that cannot be"
            )
        out = bytearray(head) + zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            frame, max_output_size=nbytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise InvalidDelta(f"this compressed delta cannot be decompressed: {error}") from error
    out[5] = 0
    plain = core.pin(out, writable=True)
    deltas.seal(plain, len(out))
    return plain


def require_question(what: str) -> None:
    """Refuse what `Delta.changed` has no answer to."""
    if what not in ("elements", "rows", "mask"):
        raise InvalidMemory(f'what= is "elements", "rows" or "mask", not {what!r}')


def most_nbytes(target_nbytes: int) -> int:
    """What a delta for a memory of that length has at most, and room for `diff` to make it in."""
    return target_nbytes + target_nbytes // 64 + _MOST_GRANULE


def itemsize_and_shape(array: Any) -> tuple[int, tuple[int, ...]]:
    """Of anything with elements.

    Raises:
        InvalidMemory: it is not C-contiguous, or has none.
    """
    if hasattr(array, "element_size") and hasattr(array, "is_contiguous"):  # a tensor
        if not array.is_contiguous():
            raise InvalidMemory("this tensor is not contiguous: pass the one that owns the memory")
        return int(array.element_size()), tuple(array.shape)
    core.load()
    pinned = pin(array, what="array", writable=False)
    shape, itemsize = pinned.shape or (), pinned.nbytes
    for length in shape:
        itemsize //= length
    return itemsize, shape


def _require_target(nbytes: int, wanted: int | None) -> None:
    if wanted is not None and nbytes != wanted:
        raise InvalidMemory(f"this delta is for a memory of {nbytes} bytes, not of {wanted}")


# ---- the memory and its mirror --------------------------------------------------------------------------------------


def _pinned(buffer: Any, what: str, *, writable: bool) -> Pinned:
    """As `pin`, at a third of what it takes where nothing is asked but where the bytes are."""
    try:
        hold = core.pin(buffer, writable=writable)
    except (TypeError, ValueError, BufferError):
        return pin(buffer, what=what, writable=writable)  # it knows other kinds, and says what is wrong
    if not len(hold):
        return pin(buffer, what=what, writable=writable)
    return Pinned(core.address_of(hold), len(hold), hold, None, None, buffer if isinstance(buffer, Memory) else None)


def _vanishes(memory: Any, address: int, nbytes: int, spans: tuple[Any, ...]) -> bool:
    """Whether pages of it may go away beneath a copy: a raw range, or a mapping of a file."""
    if memory.hold is None:
        return True
    if len(spans) == 1 and spans[0].address <= address and address + nbytes <= spans[0].address + spans[0].nbytes:
        return bool(spans[0].unpinned)
    known = [span for span in spans if span.address < address + nbytes and address < span.address + span.nbytes]
    if known:
        return any(span.unpinned for span in known)
    try:
        return survey(memory).unpinned
    except PermissionDenied:  # no /proc in this container
        return False


def compared(
    memory: Source, mirror: AnyBuffer | tuple[int, int], dirty: DirtySet | None, *, update: bool
) -> tuple[Any, Any, list[Any]]:
    """The pages, the memory with its mirror as the core wants them, and what must be held meanwhile."""
    core.load()
    if dirty is not None and not isinstance(dirty, DirtySet):
        raise TypeError(f"the dirty pages are a DirtySet, or None for all, not a {type(dirty).__name__}")
    cset = None if dirty is None else dirty._set
    if isinstance(memory, Region):
        extents, holds = mirrors(Layout((memory._span,)), mirror, writable=update)
        address, nbytes = memory.address, memory.nbytes
    else:
        ours, theirs = _pinned(memory, "memory", writable=False), _pinned(mirror, "mirror", writable=update)
        address, nbytes = ours.address, ours.nbytes
        if nbytes != theirs.nbytes:
            raise InvalidMemory(f"the mirror has {theirs.nbytes} bytes, the memory has {nbytes}")
        if address < theirs.address + nbytes and theirs.address < address + nbytes:
            raise InvalidMemory("the mirror overlaps the memory: pass memory of its own")
        unpinned = _vanishes(ours, address, nbytes, () if dirty is None else dirty._layout.spans)
        other = theirs.hold if theirs.hold is not None else core.pointer_to(theirs.address)
        through, holds = (None, []) if dirty is None else read_through(dirty._layout, address, nbytes)
        extents = sets.extents([sets.Extent(address, nbytes, unpinned, other, through)])
        holds += (ours.hold, theirs.hold)
    if dirty is not None:
        dirty._layout.require(address, address + nbytes, "this memory")
    return cset, extents, holds


_GRANULES = frozenset(1 << shift for shift in range(_MOST_GRANULE.bit_length()))


def granule_of(granule: int) -> int:
    """It, where it is one.

    Raises:
        InvalidMemory: it is no power of two up to 4096.
    """
    number = operator.index(granule)
    if number not in _GRANULES:
        raise InvalidMemory(f"the granule is a power of two from 1 to {_MOST_GRANULE}, not {granule}")
    return number


def diff(
    memory: Source,
    mirror: AnyBuffer | tuple[int, int],
    dirty: DirtySet | None = None,
    granule: int = 8,
    *,
    update: bool = False,
    out: AnyBuffer | None = None,
) -> Delta:
    """Find the granules of dirty pages that differ from a mirror.

    Writers may run beside: each granule is read once, so that what the delta has is what the mirror gets, and what was
    torn is dirty again in the next epoch. From 1 MiB of dirty pages on their halves are encoded side by side, one by a
    thread that ends with the call, where this thread may run on two processors (sched_setaffinity(2)); memory that may
    vanish beneath the copy is encoded by one. The bytes are the same.

    Args:
        memory: a buffer, a region, or (address, nbytes).
        mirror: what it was before, of the same length; not part of it.
        dirty: the pages in question, any superset of those that changed; None for all. It must know the memory.
        granule: a power of two from 1 to 4096 bytes. Granules count from the memory's first byte; the last may be
            short. A granule of which a dirty page has a part is in question.
        update: bring the mirror up to date in the same pass.
        out: where to put the delta, which then lives there: a writable buffer of ``nbytes + nbytes // 64 + 4096``
            bytes, or less where fewer pages are dirty. Left out, new memory is taken, whose first use costs more than
            all else.

    Raises:
        InvalidMemory: the mirror is of another length or overlaps the memory; ``out`` is too small; there is no such
            granule; or ``dirty`` does not know the memory.
        NotRegistered, SessionClosed: the region is no longer registered.
        RegionGone: a page vanished beneath the copy. The mirror is as it was.

    Thread safety: may be called from any thread; two updates of one mirror at once are not to be.
    """
    size = granule_of(granule)
    cset, extents, holds = compared(memory, mirror, dirty, update=update)
    slot = deltas.new_slot(deltas.room(cset, extents, size)) if out is None else _slot_in(out, extents[0])
    try:
        deltas.diff(cset, extents, size, update=update, slot=slot)
    finally:
        del holds  # not kept by a traceback
    return Delta(slot.out if out is not None else deltas.trimmed(slot), slot.nbytes, sealed=False)


def _slot_in(out: AnyBuffer, extent: Any) -> deltas.Slot:
    """A buffer as room for a delta of that memory."""
    target = _pinned(out, "output", writable=True)
    if target.hold is None:
        raise InvalidMemory("diff() takes its output as a buffer, not as (address, nbytes)")
    for other in (extent.address, core.address_of(extent.mirror)):
        if target.address < other + extent.nbytes and other < target.address + target.nbytes:
            raise InvalidMemory("the output overlaps the memory or its mirror: pass memory of its own")
    return deltas.Slot(target.hold, target.nbytes)


def _of(delta: Delta | AnyBuffer, target_nbytes: int | None = None) -> Delta:
    if isinstance(delta, Delta):
        _require_target(delta.target_nbytes, target_nbytes)
        return delta
    return Delta.from_bytes(delta, target_nbytes=target_nbytes)


def apply(delta: Delta | AnyBuffer, target: Source) -> None:
    """Write the changed bytes to a memory that is as the mirror was, which makes it as the memory was.

    To apply a delta twice does no more than to apply it once.

    Args:
        delta: or the bytes of one. All of it is checked before a byte is written.
        target: a writable buffer of the memory's length, a region, or (address, nbytes). What is written is dirty.

    Raises:
        InvalidDelta: no delta, damaged, cut short, or of another version.
        InvalidMemory: the target is of another length, read-only, or holds the delta itself.
        NotRegistered, SessionClosed: the region is no longer registered.
        RegionGone: a page vanished beneath the copy; bytes before it are written.

    Thread safety: may be called from any thread.
    """
    core.load()
    if isinstance(target, Region):
        hold, pinned = held(target), None
        address, nbytes, unpinned = target.address, target.nbytes, target._span.unpinned
    else:
        pinned = pin(target, what="target")
        address, nbytes, hold = pinned.address, pinned.nbytes, pinned.hold
        unpinned = _vanishes(pinned, address, nbytes, ())
    made = _of(delta, nbytes)
    at = core.address_of(made._bytes)
    if at < address + nbytes and address < at + made.nbytes:
        raise InvalidMemory("the delta lies in the memory that it is to change: copy it first")
    try:
        deltas.apply(made._bytes, made.nbytes, sets.extents([sets.Extent(address, nbytes, unpinned)]))
    finally:
        del hold, pinned  # not kept by a traceback


def compose(first: Delta | AnyBuffer, second: Delta | AnyBuffer) -> Delta:
    """One delta that does what the first and then the second does.

    Its granule is the smaller of the two, and what it names as changed is what either does.

    Args:
        first, second: deltas of one memory, or the bytes of such.

    Raises:
        InvalidDelta: no delta, damaged, cut short, or of another version.
        InvalidMemory: they are for memories of different lengths.

    Thread safety: may be called from any thread.
    """
    before = _of(first)
    after = _of(second, before.target_nbytes)
    slot = deltas.compose((before._bytes, before.nbytes), (after._bytes, after.nbytes))
    return Delta(slot.out, slot.nbytes, sealed=False)
