# SPDX-License-Identifier: MIT
"""Memory to track: made by `allocate`, or taken from any object with the buffer protocol and held by a pin."""

from __future__ import annotations

import errno
import mmap
import operator
import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import InvalidMemory, KernelRefused, LimitReached, SessionClosed, UnsupportedKernel, UsedAfterFork
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

__all__ = ["Memory", "Pinned", "allocate", "pin", "sessions"]

sessions: weakref.WeakSet[Any] = weakref.WeakSet()
"""The sessions of this process: they are told what a `Memory` does with its pages."""

_ALIGN_ATTEMPTS = 1024
_HUGE_BYTES = {"2M": 2 << 20, "1G": 1 << 30}
_MAP_HUGETLB, _MFD_HUGETLB, _HUGE_SHIFT = 0x40000, 0x4, 26
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Python 3.11


class Memory(mmap.mmap):
    """Page-aligned memory, made by `allocate`. It has the buffer protocol, and whatever `mmap.mmap` has.

    Freed with its last reference, or by `close()`, which raises BufferError while a session has it registered.

    Attributes:
        address: where it begins.
        nbytes: its length, a multiple of ``page_bytes``.
        page_bytes: the size of its pages; of a transparent huge page where it was asked for.
        name: as given, or None.
        shared: whether other processes can map it.
        huge: None, ``"transparent"``, ``"2M"`` or ``"1G"``.
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
        memory._locate()
        memory.page_bytes = core.PAGE_BYTES
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

    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Give pages back to the system: they read as zeroes from now on, and are dirty for every tracker of them.

        Args:
            offset: where to begin, in bytes.
            nbytes: how many bytes; to the end where left out. Both are multiples of the page, or of ``page_bytes`` of
                hugetlb memory. Of shared memory the pages are gone for everybody who maps it.

        Raises:
            InvalidMemory: it is not in the memory or not in whole pages.
            KernelRefused: the kernel would not.

        Thread safety: may be called beside collects.
        """
        unit = self.page_bytes if self.huge in _HUGE_BYTES else core.PAGE_BYTES
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes or offset % unit or nbytes % unit:
            raise InvalidMemory(
                f"discard() takes whole pages of {unit} bytes within the memory's {self.nbytes}, not {nbytes} bytes at "
                f"{offset}"
            )
        if not nbytes:
            return
        try:
            self.madvise(mmap.MADV_REMOVE if self.shared else mmap.MADV_DONTNEED, offset, nbytes)
        except OSError as error:
            raise KernelRefused(f"cannot discard {nbytes} bytes: {error}", errno=error.errno) from error
        finally:
            # After it: a collect that came before, and a read before the next one, must not hide it.
            self._tell_sessions(offset, nbytes)

    def _tell_sessions(self, offset: int, nbytes: int) -> None:
        for session in tuple(sessions):
            with suppress(SessionClosed, UsedAfterFork):
                session.mark_dirty((self.address + offset, nbytes))

    def resize(self, newsize: int) -> None:
        """Grow or shrink, in place or elsewhere: ``address`` may change.

        Regions of this memory are registered anew, under their names, and the trackers that watch them go on: to them
        the memory is wholly dirty in the next collect. A set collected before knows the old addresses; its bytes can no
        longer be read.

        Args:
            newsize: bytes; rounded up to the page size of its kind.

        Raises:
            InvalidMemory: not positive; something else holds the buffer, such as an array on it; shared memory that
                would shrink, or hugetlb memory that would grow. Its length is unchanged then.
            LimitReached: no memory is left.

        Thread safety: not beside a use of the memory. A collect in another thread may find it missing meanwhile.
        """
        newsize = -(-_count(newsize, "resize()") // self.page_bytes) * self.page_bytes
        if newsize == self.nbytes:
            return
        if self.shared and newsize < self.nbytes:
            raise InvalidMemory(
                "shared memory does not shrink, since others may map it: discard() gives its pages back"
            )
        if self.huge in _HUGE_BYTES and newsize > self.nbytes:
            raise InvalidMemory("hugetlb memory does not grow: allocate() more and copy")
        back = [session._move_out(self) for session in tuple(sessions) if not session.closed]
        try:
            super().resize(newsize)
        except BufferError as error:
            raise InvalidMemory(
                f"cannot resize this memory: something holds it, such as an array on it ({error})"
            ) from error
        except (OSError, ValueError, SystemError) as error:
            raise LimitReached(
                f"cannot resize this memory to {newsize} bytes: {error}. Ask for less",
                errno=getattr(error, "errno", None),
                feature="memory",
            ) from error
        finally:
            self._locate()
            for move_in in back:
                move_in()

    def _locate(self) -> None:
        self.address = core.address_of(core.pin(self, writable=True))
        self.nbytes = len(self)

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
    sparse: bool = False,
    name: str | None = None,
) -> Memory:
    """Allocate zeroed memory that is page-aligned.

    Args:
        nbytes: at least this many bytes; rounded up to the page size of its kind.
        shared: False: private to this process. True: a sealed memfd that other processes can map by `Memory.fileno`
            and that nobody can shrink; a child of a fork writes the same memory.
        huge: None; ``"transparent"`` for memory that is aligned to transparent huge pages and asks for them; ``"2M"``
            or ``"1G"`` for huge pages of the system's pool, which are dirty as a whole.
        sparse: a reservation of which most is never touched, and which may be larger than the machine's memory: the
            system sets nothing aside for it, and what is touched takes memory as it is touched. Shared memory is so
            anyway, and where ``vm.overcommit_memory`` is 2 nothing is.
        name: shown in /proc/PID/maps where the kernel can, and taken over by regions.

    Raises:
        InvalidMemory: ``nbytes`` is not positive, ``huge`` is none of the above, or ``sparse`` is asked for of huge
            pages of the pool, which are set aside here so that none is missing later.
        UnsupportedKernel: no huge pages of that kind here, or not Linux.
        LimitReached: the kernel has no memory, mapping or descriptor left, or the pool no huge page (vm.nr_hugepages).

    Thread safety: may be called from any thread.
    """
    core.load()
    nbytes = _count(nbytes, "allocate()")
    if sparse and huge in _HUGE_BYTES:
        raise InvalidMemory(f"huge pages of the pool are set aside ahead: leave out sparse=, or huge={huge!r}")
    page_bytes = _page_bytes(huge)
    nbytes = -(-nbytes // page_bytes) * page_bytes
    fd = -1
    try:
        if shared:
            fd = _sealed_memfd(name or "dirtytrack", nbytes, huge)
        flags = _huge_flags(huge, _MAP_HUGETLB) | (_MAP_NORESERVE if sparse else 0)
        memory = _map(fd, nbytes, page_bytes, flags)
        memory._fd = fd
        fd = -1
    except (OSError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else errno.ENOMEM
        if huge in _HUGE_BYTES and number == errno.ENOMEM:
            raise _pool_is_empty(nbytes, page_bytes, error) from error
        promised = "" if sparse or shared else " pass sparse=True where most of it is never touched,"
        raise LimitReached(
            f"cannot allocate {nbytes} bytes: {error}. Ask for less,{promised} or look at RLIMIT_AS, RLIMIT_NOFILE, "
            "vm.max_map_count and vm.overcommit_memory",
            errno=number,
            feature="memory",
        ) from error
    finally:
        if fd >= 0:
            os.close(fd)
    memory.page_bytes, memory.name, memory.shared, memory.huge = page_bytes, name, shared, huge
    if huge == "transparent":
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise UnsupportedKernel(
                f"this kernel refuses transparent huge pages for this memory: {error}. Leave out huge=",
                errno=error.errno,
                feature="transparent huge pages",
            ) from error
    if name and not shared and huge not in _HUGE_BYTES:
        placing.name_mapping(memory.address, nbytes, name)
    return memory


def _page_bytes(huge: str | None) -> int:
    if huge is None:
        return core.PAGE_BYTES
    if huge in _HUGE_BYTES:
        if not _pool(_HUGE_BYTES[huge]).is_dir():
            if not mappings.sys_is_there():
                raise _untold(f"whether this machine has huge pages of {huge}", "hugetlb")
            raise UnsupportedKernel(
                f"this machine has no huge pages of {huge} (no {_pool(_HUGE_BYTES[huge])}). Leave out huge=, or use "
                "huge='transparent'",
                feature="hugetlb",
            )
        return _HUGE_BYTES[huge]
    if huge != "transparent":
        raise InvalidMemory(f"huge takes None, 'transparent', '2M' or '1G', not {huge!r}")
    size = mappings.thp_bytes()
    if not size:
        if not mappings.sys_is_there():
            raise _untold("how large a transparent huge page is", "transparent huge pages")
        raise UnsupportedKernel(
            "this kernel has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE). Leave out huge=",
            feature="transparent huge pages",
        )
    return size


def _untold(what: str, feature: str) -> UnsupportedKernel:
    return UnsupportedKernel(
        f"{what} cannot be told: /sys is not mounted here. Mount it, or leave out huge=", feature=feature
    )


def _pool(page_bytes: int) -> Path:
    return Path(f"/sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB")


def _pool_is_empty(nbytes: int, page_bytes: int, error: BaseException) -> LimitReached:
    needed, free = nbytes // page_bytes, "an unknown number of"
    with suppress(OSError):
        free = (_pool(page_bytes) / "free_hugepages").read_text().strip()
    return LimitReached(
        f"cannot allocate {nbytes} bytes: it takes {needed} huge pages of {page_bytes >> 20} MiB, and the pool has "
        f"{free} free ({error}). As root: sysctl vm.nr_hugepages=N, or write N to {_pool(page_bytes)}/nr_hugepages "
        "(1 GiB pages are best reserved at boot: hugepagesz=1G hugepages=N); a hugetlb cgroup may limit it too",
        errno=errno.ENOMEM,
        feature="vm.nr_hugepages",
    )


def _count(number: int, what: str) -> int:
    try:
        number = operator.index(number)
    except TypeError:
        raise InvalidMemory(f"{what} takes a number of bytes, not {type(number).__name__}") from None
    if number <= 0:
        raise InvalidMemory(f"{what} takes a positive number of bytes, not {number}")
    return number


def _huge_flags(huge: str | None, flag: int) -> int:
    if huge not in _HUGE_BYTES:
        return 0
    return flag | (_HUGE_BYTES[huge].bit_length() - 1) << _HUGE_SHIFT


def _sealed_memfd(name: str, nbytes: int, huge: str | None) -> int:
    shown = name.encode(errors="replace").replace(b"\0", b"?")[:200].decode(errors="ignore")
    fd = os.memfd_create(shown, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _huge_flags(huge, _MFD_HUGETLB))
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _map(fd: int, nbytes: int, alignment: int, flags: int) -> Memory:
    """A mapping at a multiple of ``alignment``.

    Kernels that can track (Linux 6.7) align large mappings to huge pages by themselves, but not each of them always.
    """
    memory = _map_anywhere(fd, nbytes, flags)
    if memory.address % alignment == 0:
        return memory
    in_the_way = [memory]  # kept until the end, so that the kernel finds no other place for the next one
    with placing.aligned_hole(nbytes, alignment):
        for _ in range(_ALIGN_ATTEMPTS):
            memory = _map_anywhere(fd, nbytes, flags)
            if memory.address % alignment == 0:
                return memory
            in_the_way.append(memory)
    raise OSError(errno.ENOMEM, f"no free range that is aligned to {alignment} bytes was found")


def _map_anywhere(fd: int, nbytes: int, flags: int) -> Memory:
    kind = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags
    return Memory(fd, nbytes, flags=kind)


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
