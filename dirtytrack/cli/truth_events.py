# SPDX-License-Identifier: MIT
"""What can happen to memory: the rows of `dirtytrack doctor --truth`, each with the kinds of memory it is tried on.

All is done to unit 1 of an area that has content, all pages being armed; unless the row says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from ..kernel import trial_io
from ..kernel.trial import Area, NotHere

__all__ = ["EVENTS", "REGISTERED", "Event"]

_PLAIN = ("anonymous", "transparent huge")
_SHARED_FILES = ("memfd shared", "file shared")
_PRIVATE_FILES = ("memfd private", "file private")
_SHARED = (*_SHARED_FILES, "transparent huge shared", "hugetlb shared")
_ALL = (*_PLAIN, *_SHARED_FILES, *_PRIVATE_FILES, "transparent huge shared", "hugetlb private", "hugetlb shared")
_MARKED = (*_PRIVATE_FILES, "hugetlb private")
_PINNED = (*_PLAIN, "memfd shared", "hugetlb private", "hugetlb shared")
_NOT_HUGETLB = ("anonymous", "transparent huge", "memfd shared", "file shared")

REGISTERED = (
    *_ALL,
    "anonymous shared",
    "System V shared",
    "memfd_secret",
    "/dev/zero private",
    "anonymous read-only",
    "anonymous without access",
    "file shared, opened read-only",
    "MAP_DROPPABLE",
)
"""Kinds of memory of which the table says whether they can be registered."""


class Event(NamedTuple):
    """Something that happens to memory."""

    name: str
    kinds: tuple[str, ...]
    happen: Callable[[Area], None]
    blind: bool = False
    """Documented as a blind spot: no page table of this process sees it."""
    flight: bool = False
    """A device writes until it is done, or somebody as one does: declared by in_flight(), not by mark_dirty()."""
    hole: bool = False
    """The exact scan misses it on some kernel: the doctor tries it at each visit."""
    untouched: bool = False
    """The memory has no content before."""
    before: Callable[[Area], None] | None = None
    """Done before the memory is registered."""
    hangs: bool = False
    """Some kernel never returns from it: short time-out, once only."""


def _read_into(area: Area) -> None:
    reads, writes = os.pipe()
    try:
        os.write(writes, b"\x5a" * 8)
        os.readv(reads, [area.view(1)[8:16]])
    finally:
        os.close(reads)
        os.close(writes)


def _write_by_proc(area: Area) -> None:
    try:
        fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NotHere(str(error)) from error
    try:
        os.pwrite(fd, b"\x5a" * 8, area.at(1) + 8)
    except OSError as error:
        raise NotHere(f"/proc/self/mem: {error.strerror}") from error
    finally:
        os.close(fd)


def _fork(area: Area, child: Callable[[Area], None], parent: Callable[[Area], None]) -> None:
    """The parent acts while the child lives."""
    reads, writes = os.pipe()
    number = os.fork()
    if not number:
        with suppress(BaseException):
            os.close(writes)
            child(area)
            os.read(reads, 1)  # the end of the file: the parent has done its part
        os._exit(0)
    os.close(reads)
    try:
        parent(area)
    finally:
        os.close(writes)
        os.waitpid(number, 0)


def _nothing(area: Area) -> None:
    pass


def _store(area: Area) -> None:
    area.store(1)


def _load(area: Area) -> None:
    area.load(1)


def _fork_and_store(area: Area) -> None:
    _fork(area, _nothing, _store)


def _store_by_child(area: Area) -> None:
    reads, writes = os.pipe()

    def child(area: Area) -> None:
        area.store(1)
        os.write(writes, b"x")

    def parent(area: Area) -> None:
        os.read(reads, 1)

    try:
        _fork(area, child, parent)
    finally:
        os.close(reads)
        os.close(writes)


def _after_a_store(then: Callable[[Area], None]) -> Callable[[Area], None]:
    def happen(area: Area) -> None:
        area.store(1)
        then(area)

    return happen


def _then_read(first: Callable[[Area], None]) -> Callable[[Area], None]:
    def happen(area: Area) -> None:
        first(area)
        area.load(1)

    return happen


def _discard(area: Area) -> None:
    area.discard(1)


def _remove(area: Area) -> None:
    area.remove(1)


def _punch(area: Area) -> None:
    area.punch(1)


def _discard_all(area: Area) -> None:
    area.discard(0, area.nbytes // area.unit_bytes)


def _punch_two_and_store(area: Area) -> None:
    area.punch(1, 2)
    area.store(1)


def _free_and_reclaim(area: Area) -> None:
    area.free(1)
    area.page_out(1)


def _store_and_page_out(area: Area) -> None:
    area.store(1)
    with suppress(NotHere):
        area.write_back()
    area.page_out(1)


def _guard(area: Area) -> None:
    area.guard(1)
    area.unguard(1)


def _map_again_and_store(area: Area) -> None:
    area.map_again()
    area.store_by_alias(1)


def _protect_and_store(area: Area) -> None:
    area.protect(writable=False)
    area.protect(writable=True)
    area.store(1)


def _fill_and_collapse(area: Area) -> None:
    area.fill(9)
    with suppress(NotHere):
        area.collapse(1)


EVENTS = (
    Event("store", _ALL, _store),
    Event("store of the same value", ("anonymous", "memfd shared"), lambda area: area.store(1, 3)),
    Event("first store where nothing was touched", (*_PLAIN, *_PRIVATE_FILES), _store, untouched=True),
    Event("read only, where nothing was touched", ("anonymous", "hugetlb private"), _load,
          untouched=True),
    Event("store in a range never touched", ("anonymous, 4 MiB",), _store, hole=True, untouched=True),
    Event("read(2) into it", _ALL, _read_into),
    Event("write to /proc/self/mem", _ALL, _write_by_proc),
    Event("process_vm_writev", _ALL, trial_io.write_by_process_vm),
    Event("read(2) that began before the arming", ("anonymous", "memfd shared"), trial_io.end_read,
          before=trial_io.begin_read),
    Event("read by O_DIRECT", _PINNED, trial_io.direct_read),
    Event("read by io_uring", _PINNED, trial_io.read_by_ring),
    Event("read by io_uring into a registered buffer", _PINNED, trial_io.read_into_registered, blind=True,
          flight=True, before=trial_io.register_buffer),
    Event("store while a forked child lives", _ALL, _fork_and_store),
    Event("store by a forked child", (*_SHARED, "anonymous shared"), _store_by_child, blind=True),
    Event("mprotect read-only and back, store", _NOT_HUGETLB, _protect_and_store),
    Event("MADV_POPULATE_WRITE", ("anonymous", "memfd shared", "hugetlb private"), lambda area: area.populate(1)),
    Event("mlock", ("anonymous",), lambda area: area.lock()),
    Event("all stored to, MADV_COLLAPSE", ("transparent huge",), _fill_and_collapse),
    Event("store, msync, MADV_PAGEOUT", _NOT_HUGETLB, _store_and_page_out),
    Event("MADV_DONTNEED", ("anonymous", *_MARKED, *_SHARED), _discard, hole=True),
    Event("MADV_DONTNEED of a dirty page", ("anonymous", *_MARKED, *_SHARED), _after_a_store(_discard), hole=True),
    Event("MADV_DONTNEED of a whole huge page", ("transparent huge",), _discard, hole=True),
    Event("MADV_DONTNEED of a whole huge page, dirty", ("transparent huge",), _after_a_store(_discard)),
    Event("MADV_DONTNEED of 4 MiB", ("anonymous, 4 MiB",), _discard_all, hole=True),
    Event("MADV_DONTNEED, then read", ("anonymous",), _then_read(_discard)),
    Event("MADV_DONTNEED, then read", _MARKED, _then_read(_discard), blind=True),
    Event("MADV_DONTNEED_LOCKED", ("anonymous", *_MARKED), lambda area: area.discard_locked(1)),
    Event("MADV_FREE", _PLAIN, lambda area: area.free(1)),
    Event("MADV_FREE, reclaimed", _PLAIN, _free_and_reclaim, hole=True),
    Event("MADV_REMOVE", (*_SHARED, "anonymous shared"), _remove, hole=True),
    Event("MADV_REMOVE of a dirty page", _SHARED, _after_a_store(_remove)),
    Event("MADV_REMOVE, then read", _SHARED, _then_read(_remove), blind=True),
    Event("hole punched", _SHARED, _punch, hole=True),
    Event("hole punched, dirty page", _SHARED, _after_a_store(_punch)),
    Event("hole of two punched, store to one", _SHARED, _punch_two_and_store),
    Event("hole of two punched, store to one, nothing touched before", _SHARED_FILES, _punch_two_and_store,
          untouched=True),
    Event("hole punched, then read", _SHARED, _then_read(_punch), blind=True),
    Event("range zeroed", ("file shared",), lambda area: area.zero(1)),
    Event("hole punched in part of a page", ("memfd shared",), trial_io.punch_part, blind=True),
    Event("truncated and grown", (*_SHARED_FILES, *_PRIVATE_FILES, "hugetlb shared"), lambda area: area.cut(1),
          hole=True),
    Event("truncated and grown, dirty page", ("memfd shared", "hugetlb shared"),
          _after_a_store(lambda area: area.cut(1)), hole=True),
    Event("write(2) to the file", _SHARED_FILES, lambda area: area.write_file(1), blind=True),
    Event("write(2) to the file, beneath pages never written", _PRIVATE_FILES, lambda area: area.write_file(1),
          blind=True, untouched=True, before=_load),
    Event("store by a mapping made before", _SHARED, lambda area: area.store_by_alias(1), hole=True,
          before=lambda area: area.map_again()),
    Event("store by a mapping made after", _SHARED, _map_again_and_store, blind=True),
    Event("moved by mremap", ("anonymous", "memfd shared"), lambda area: area.move()),
    Event("mapped over", ("anonymous", "memfd shared"), lambda area: area.map_over()),
    Event("guard page put in and taken out", ("anonymous",), _guard),
    Event("guard page put in and taken out", ("memfd shared", "file private"), _guard, hangs=True),
)  # fmt: skip
