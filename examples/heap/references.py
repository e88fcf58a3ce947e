# SPDX-License-Identifier: MIT
"""Ref: how Python holds an object of a heap; and values, which are what a slot can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from .errors import WrongKind
from .native import ffi

if TYPE_CHECKING:
    from .heap import Heap

__all__ = ["Ref", "Value", "signed", "value_of", "word_of"]

_NIL, _TRUE, _FALSE = 0, 2, 6
_KINDS: tuple[Literal["tuple", "bytes", "array"], ...] = ("tuple", "bytes", "array")
_ARRAY = 3
_ALL, _MOST = (1 << 64) - 1, 1 << 62


class Ref:
    """An object of a heap, which is alive as long as this is. Compares equal to references to the same object.

    Thread safety: as of the heap. Items are read and written at once, each by itself.
    """

    __slots__ = ("handle", "heap")

    def __init__(self, heap: Heap, handle: int) -> None:
        self.heap, self.handle = heap, handle

    def __del__(self) -> None:
        self.heap._drop(self.handle)

    def _described(self) -> tuple[int, int, int]:
        heap, thread = self.heap, self.heap._thread()
        kind, tag, length = ffi.new("uint32_t *"), ffi.new("uint32_t *"), ffi.new("uint64_t *")
        heap._check(heap._lib.heap_kind_of(thread.native, self.handle, kind, tag, length))
        return kind[0], tag[0], length[0]

    @property
    def kind(self) -> Literal["tuple", "bytes", "array"]:
        """What it is."""
        return _KINDS[self._described()[0] - 1]

    @property
    def tag(self) -> int:
        """The number that it was made with."""
        return self._described()[1]

    def __len__(self) -> int:
        return self._described()[2]

    def __bool__(self) -> bool:
        return True

    def _index(self, index: int) -> int:
        if index < 0:
            index += len(self)
        if index < 0:
            raise IndexError("the object is not so long")
        return index

    def __getitem__(self, index: int) -> Value:
        heap, thread = self.heap, self.heap._thread()
        word, kind = thread.word, thread.kind
        heap._check(heap._lib.heap_get(thread.native, self.handle, self._index(index), thread.spare, word, kind))
        if kind[0] == _ARRAY:
            return signed(word[0])
        value = value_of(word[0])
        return heap._ref(thread) if value is Ref else value  # type: ignore[return-value]

    def __setitem__(self, index: int, value: Value) -> None:
        heap, thread, index = self.heap, self.heap._thread(), self._index(index)
        if isinstance(value, Ref):
            if value.heap is not heap:
                raise WrongKind("this object is of another heap")
            outcome = heap._lib.heap_set_object(thread.native, self.handle, index, value.handle)
        elif value is None or isinstance(value, bool):
            outcome = heap._lib.heap_set(thread.native, self.handle, index, word_of(value))
        elif -(1 << 63) <= value < 1 << 63:
            if not -_MOST <= value < _MOST and self._described()[0] != _ARRAY:
                raise WrongKind(f"a slot of a tuple holds numbers of 63 bits, not {value}")
            outcome = heap._lib.heap_set_number(thread.native, self.handle, index, value)
        else:
            raise WrongKind(f"an array holds numbers of 64 bits, not {value}")
        heap._check(outcome)

    def __iter__(self) -> Iterator[Value]:
        return (self[i] for i in range(len(self)))

    def copy_items(self, start: int, to: Ref, at: int, count: int) -> None:
        """Copy items to another object of this kind, or within this one: by one memmove, as fast as memory is."""
        heap, thread = self.heap, self.heap._thread()
        if to.heap is not heap:
            raise WrongKind("this object is of another heap")
        heap._check(heap._lib.heap_copy(thread.native, self.handle, start, to.handle, at, count))

    @contextmanager
    def contents(self) -> Iterator[memoryview]:
        """``with ref.contents() as view: ...``: its bytes, where they are. No object moves, and every collection waits,
        until the end, as in `Heap.running`; do not allocate in it."""
        heap = self.heap
        with heap.running():
            address, nbytes = ffi.new("uint8_t **"), ffi.new("uint64_t *")
            heap._check(heap._lib.heap_contents(heap._thread().native, self.handle, address, nbytes))
            with memoryview(ffi.buffer(address[0], nbytes[0])) as view:
                yield view.cast("B")

    def __bytes__(self) -> bytes:
        with self.contents() as view:
            return view.tobytes()

    @property
    def text(self) -> str:
        """Of a string."""
        return bytes(self).decode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ref) or other.heap is not self.heap:
            return False
        same = ffi.new("uint32_t *")
        self.heap._check(self.heap._lib.heap_same(self.heap._thread().native, self.handle, other.handle, same))
        return bool(same[0])

    __hash__ = None  # type: ignore[assignment]  # an object that moves has no number of its own

    def __repr__(self) -> str:
        kind, tag, length = self._described()
        return f"<Ref to {_KINDS[kind - 1]} of {length}{f', tag {tag}' if tag else ''}>"


Value = bool | int | Ref | None
"""What a slot of a tuple holds; numbers have 63 bits."""


def signed(word: int) -> int:
    """Of a word in two's complement."""
    return word - (1 << 64) if word >> 63 else word


def word_of(value: bool | int | None) -> int:
    """As a slot holds it.

    Raises:
        WrongKind: it holds no such thing, or no number so large.
    """
    if value is None:
        return _NIL
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    if -_MOST <= value < _MOST:
        return (value << 1 | 1) & _ALL
    raise WrongKind(f"a slot of a tuple holds numbers of 63 bits, not {value}")


def value_of(word: int) -> bool | int | type[Ref] | None:
    """What a slot that holds this holds; Ref itself for an object."""
    if word & 1:
        return signed(word) >> 1
    return {_NIL: None, _TRUE: True, _FALSE: False}.get(word, Ref)
