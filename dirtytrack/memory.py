# SPDX-License-Identifier: MIT
"""Memory to track: made by `allocate`, or taken from any object with the buffer protocol and held by a pin."""

from __future__ import annotations

import errno
import mmap
import operator
import os
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import InvalidMemory, LimitReached, UnsupportedKernel
from .kernel import core, mappings, placing
from .kernel.abi import Address, Fd

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from typing import Protocol

    from typing_extensions import Buffer

    class _Array(Protocol):
        """A numpy array, which type checkers know as a buffer from Python 3.12 on only."""

        @property
        def __array_interface__(self) -> dict[str, Any]: ...

    class _SharedMemory(Protocol):
        """multiprocessing.shared_memory.SharedMemory, which has a buffer and is none."""

        @property
        def buf(self) -> memoryview | None: ...

    AnyBuffer = Buffer | _Array | _SharedMemory

__all__ = ["Memory", "Pinned", "allocate", "pin"]

_ALIGN_ATTEMPTS = 1024


class Memory(mmap.mmap):
    """Page-aligned memory, made by `allocate`. It has the buffer protocol, and whatever `mmap.mmap` has.

    Freed with its last reference, or by `close()`, which raises BufferError while a session has it registered.

    Attributes:
        address: where it begins.
        nbytes: its length, a multiple of ``page_bytes``.
        page_bytes: the size of its pages; of a transparent huge page where it was asked for.
        name: as given, or None.
        shared: whether other processes can map it.
        huge: None or ``"transparent"``.
    """

    address: Address
    nbytes: int
    page_bytes: int
    name: str | None = None
    shared: bool = False
    huge: str | None = None
    _fd: int = -1

    def __new__(cls, *arguments: Any, **options: Any) -> Memory:
        """As mmap.mmap; `allocate` is the way to call it."""
        memory = super().__new__(cls, *arguments, **options)
        core.load()
        memory.address = core.address_of(core.pin(memory, writable=True))
        memory.nbytes, memory.page_bytes = len(memory), core.PAGE_BYTES
        return memory

    def fileno(self) -> Fd:
        """The descriptor by which others map shared memory; it stays this object's.

        Raises:
            InvalidMemory: the memory is private, or closed.
        """
        if self._fd < 0:
            why = "this memory is closed" if self.shared else "private memory has no descriptor: allocate(shared=True)"
            raise InvalidMemory(why)
        return Fd(self._fd)

    def resize(self, newsize: int) -> None:
        """Memory keeps its place and length, so that regions and addresses stay true.

        Raises:
            InvalidMemory: always. Allocate another.
        """
        raise InvalidMemory(f"Memory cannot be resized, not to {newsize} bytes either: allocate() another and copy")

    def close(self) -> None:
        """Free the memory now.

        Raises:
            BufferError: something holds it, for example a session that has it registered.
        """
        super().close()
        self._close_descriptor()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _close_descriptor(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self._close_descriptor()

    def __repr__(self) -> str:
        kind = "shared " if self.shared else ""
        name = f" {self.name!r}" if self.name else ""
        return f"<{kind}Memory{name} of {self.nbytes} bytes at {self.address:#x}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("Memory cannot be pickled: it is the memory itself. Send its bytes, or its descriptor")


def allocate(
    nbytes: int,
    *,
    shared: bool = False,
    huge: Literal["transparent", "2M", "1G"] | None = None,
    name: str | None = None,
) -> Memory:
    """Allocate zeroed memory that is page-aligned.

    Args:
        nbytes: at least this many bytes; rounded up to the page size of its kind.
        shared: False: private to this process. True: a sealed memfd that other processes can map by `Memory.fileno`
            and that nobody can shrink or grow; a child of a fork writes the same memory.
        huge: None, or ``"transparent"`` for memory that is aligned to transparent huge pages and asks for them.
            ``"2M"`` and ``"1G"`` (hugetlb) are for a later version.
        name: shown in /proc/PID/maps where the kernel can, and taken over by regions.

    Raises:
        InvalidMemory: ``nbytes`` is not positive, or ``huge`` is none of the above.
        UnsupportedKernel: no transparent huge pages here, or not Linux.
        LimitReached: the kernel has no memory, mapping or descriptor left.

    Thread safety: may be called from any thread.
    """
    core.load()
    try:
        nbytes = operator.index(nbytes)
    except TypeError:
        raise InvalidMemory(f"allocate() takes a number of bytes, not {type(nbytes).__name__}") from None
    if nbytes <= 0:
        raise InvalidMemory(f"allocate() takes a positive number of bytes, not {nbytes}")
    page_bytes = _page_bytes(huge)
    nbytes = -(-nbytes // page_bytes) * page_bytes
    fd = -1
    try:
        if shared:
            fd = _sealed_memfd(name or "dirtytrack", nbytes)
        memory = _map(fd, nbytes, page_bytes)
        memory._fd = fd
        fd = -1
    except (OSError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOMEM
        raise LimitReached(
            f"cannot allocate {nbytes} bytes: {error}. Ask for less, or look at RLIMIT_AS, RLIMIT_NOFILE, "
            "vm.max_map_count and vm.overcommit_memory",
            errno=number,
            feature="memory",
        ) from error
    finally:
        if fd >= 0:
            os.close(fd)
    memory.page_bytes, memory.name, memory.shared, memory.huge = page_bytes, name, shared, huge
    if huge:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise UnsupportedKernel(
                f"this kernel refuses transparent huge pages for this memory: {error}. Leave out huge=",
                errno=error.errno,
                feature="transparent huge pages",
            ) from error
    if name and not shared:
        placing.name_mapping(memory.address, nbytes, name)
    return memory


def _page_bytes(huge: str | None) -> int:
    if huge is None:
        return core.PAGE_BYTES
    if huge in ("2M", "1G"):
        raise InvalidMemory(f"huge={huge!r}: this version does not do hugetlb memory yet; huge='transparent' it does")
    if huge != "transparent":
        raise InvalidMemory(f"huge takes None, 'transparent', '2M' or '1G', not {huge!r}")
    size = mappings.thp_bytes()
    if not size:
        raise UnsupportedKernel(
            "this kernel has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE). Leave out huge=",
            feature="transparent huge pages",
        )
    return size


def _sealed_memfd(name: str, nbytes: int) -> int:
    shown = name.encode(errors="replace").replace(b"\0", b"?")[:200].decode(errors="ignore")
    fd = os.memfd_create(shown, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, nbytes: int, alignment: int) -> Memory:
    """A mapping at a multiple of ``alignment``.

    Kernels that can track (Linux 6.7) align large mappings to huge pages by themselves, but not each of them always.
    """
    memory = _map_anywhere(fd, nbytes)
    if memory.address % alignment == 0:
        return memory
    in_the_way = [memory]  # kept until the end, so that the kernel finds no other place for the next one
    with placing.aligned_hole(nbytes, alignment):
        for _ in range(_ALIGN_ATTEMPTS):
            memory = _map_anywhere(fd, nbytes)
            if memory.address % alignment == 0:
                return memory
            in_the_way.append(memory)
    raise OSError(errno.ENOMEM, f"no free range that is aligned to {alignment} bytes was found")


def _map_anywhere(fd: int, nbytes: int) -> Memory:
    return Memory(fd, nbytes, flags=mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


# ---- other people's buffers ------------------------------------------------------------------------------------------


class Pinned(NamedTuple):
    """A span of bytes and what holds it there."""

    address: Address
    nbytes: int
    hold: Any
    """Keeps the buffer from being freed or resized; None for a raw (address, nbytes)."""
    shape: tuple[int, ...] | None
    dtype: str | None
    memory: Memory | None
    """The `Memory` that it is, where it is one."""


def pin(buffer: AnyBuffer | tuple[int, int], *, what: str = "buffer", writable: bool = True) -> Pinned:
    """Find where a buffer's bytes are, and hold them there.

    Args:
        buffer: an object with the buffer protocol, C-contiguous; `multiprocessing.shared_memory.SharedMemory`; or an
            (address, nbytes) pair, which cannot be held.
        what: how the message calls it.
        writable: whether a read-only buffer is refused.

    Raises:
        InvalidMemory: read-only, not contiguous, empty, or no buffer at all.
    """
    if isinstance(buffer, tuple):
        return _raw(buffer, what)
    source: Any = buffer
    inner = getattr(source, "buf", None)
    if isinstance(inner, memoryview):  # SharedMemory, which has no buffer protocol of its own
        source = inner
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    try:
        with memoryview(source) as view:
            shape, dtype = view.shape, view.format
            if writable and view.readonly:
                raise InvalidMemory(f"this {what} is read-only ({_type_of(buffer)}): pass one that can be written")
            if not view.nbytes:
                raise InvalidMemory(f"this {what} is empty ({_type_of(buffer)})")
            if not view.c_contiguous:
                raise InvalidMemory(
                    f"this {what} is not C-contiguous ({_type_of(buffer)}, strides {view.strides}): pass the array "
                    "that owns the memory, or numpy.ascontiguousarray of it"
                )
    except TypeError:
        raise InvalidMemory(_no_buffer(buffer, what)) from None
    except ValueError as error:
        if isinstance(error, InvalidMemory):
            raise
        if isinstance(source, memoryview):
            raise InvalidMemory(f"this {what} cannot be used ({_type_of(buffer)}): {error}") from error
        shape, dtype = _described(source)  # numpy types that memoryview cannot tell (datetime64)
    except BufferError as error:
        raise InvalidMemory(f"this {what} gives no buffer ({_type_of(buffer)}): {error}") from error
    try:
        hold = core.pin(source, writable=writable)
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidMemory(f"this {what} cannot be used ({_type_of(buffer)}): {error}") from error
    if not len(hold):
        raise InvalidMemory(f"this {what} is empty ({_type_of(buffer)})")
    memory = buffer if isinstance(buffer, Memory) else None
    return Pinned(core.address_of(hold), len(hold), hold, shape, dtype, memory)


def _raw(pair: tuple[Any, ...], what: str) -> Pinned:
    try:
        address, nbytes = (operator.index(number) for number in pair)
    except (TypeError, ValueError):
        raise InvalidMemory(f"a raw {what} is an (address, nbytes) pair of whole numbers, not {pair!r}") from None
    if nbytes <= 0 or address < 0 or address + nbytes >= 1 << 64:
        problem = "is empty" if nbytes == 0 else "is not in any address space"
        raise InvalidMemory(f"this raw {what} {problem}: address {address:#x}, {nbytes} bytes")
    return Pinned(Address(address), nbytes, None, None, None, None)


def _described(array: Any) -> tuple[tuple[int, ...] | None, str | None]:
    shape = getattr(array, "shape", None)
    dtype = getattr(getattr(array, "dtype", None), "str", None)
    return (shape if isinstance(shape, tuple) else None), dtype


def _type_of(buffer: object) -> str:
    return f"{type(buffer).__module__}.{type(buffer).__qualname__}".removeprefix("builtins.")


def _no_buffer(buffer: object, what: str) -> str:
    kind = _type_of(buffer)
    does = "an array, an mmap or an (address, nbytes) pair"
    if kind.startswith("torch."):
        does = "tensor.numpy(), which shares its memory"
    return f"this {what} is of type {kind}, which has no buffer protocol: pass {does}"
