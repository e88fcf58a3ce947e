# SPDX-License-Identifier: MIT
"""An object graph in a heap beside the obvious model of it, a dict of objects by number; and ways to store a reference.

Every object carries its number in its first word, so that what a heap lists can be told apart.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from examples.heap import Heap, Ref

Kind = Literal["tuple", "bytes", "array"]
Store = Callable[[Heap, Ref, int, Ref | None], None]


@dataclass
class Node:
    """An object as it should be; slot 0, the number, is not among the slots."""

    kind: Kind
    slots: list[int | None] = field(default_factory=list)
    content: bytes = b""


# ---- ways to store a reference ---------------------------------------------------------------------------------------


def plainly(heap: Heap, holder: Ref, index: int, value: Ref | None) -> None:
    holder[index] = value


def through_memory(heap: Heap, holder: Ref, index: int, value: Ref | None) -> None:
    with holder.contents() as view:
        view.cast("Q")[index] = heap.word(value)


def by_memcpy(heap: Heap, holder: Ref, index: int, value: Ref | None) -> None:
    with holder.contents() as view:
        word = heap.word(value).to_bytes(8, "little")
        ctypes.memmove((ctypes.c_char * 8).from_buffer(view, 8 * index), word, 8)


def by_read(heap: Heap, holder: Ref, index: int, value: Ref | None) -> None:
    """The kernel stores it: read(2) from a pipe into the heap."""
    reader, writer = os.pipe()
    try:
        with holder.contents() as view:
            os.write(writer, heap.word(value).to_bytes(8, "little"))
            assert os.readv(reader, [view[8 * index : 8 * index + 8]]) == 8
    finally:
        os.close(reader)
        os.close(writer)


def by_another_thread(heap: Heap, holder: Ref, index: int, value: Ref | None) -> None:
    failed: list[BaseException] = []

    def store() -> None:
        try:
            holder[index] = value
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=store)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def by_copying(heap: Heap, holder: Ref, index: int, value: Ref | None) -> None:
    """memmove of a slot of another object."""
    heap.tuple(0, value).copy_items(1, holder, index, 1)


STORES: tuple[Store, ...] = (plainly, through_memory, by_memcpy, by_read, by_another_thread, by_copying)


# ---- a graph --------------------------------------------------------------------------------------------------------


class Graph:
    """What some mutator made in a heap: `nodes` are all that may still be there, `held` those it has references to."""

    def __init__(self, heap: Heap, first: int = 1) -> None:
        self.heap, self._next = heap, first
        self.nodes: dict[int, Node] = {}
        self.held: dict[int, Ref] = {}

    # ---- changing both

    def make(self, kind: Kind, length: int) -> int:
        """A new object, which is held; its number."""
        number, self._next = self._next, self._next + 1
        if kind == "tuple":
            made = self.heap.vector(1 + length)
            made[0] = number
            node = Node(kind, slots=[None] * length)
        else:
            content = bytes((number + i) % 251 for i in range(8 * length))
            made = self.heap.bytes(8 + len(content)) if kind == "bytes" else self.heap.array(1 + length)
            with made.contents() as view:
                view[:8] = number.to_bytes(8, "little")
                view[8:] = content
            node = Node(kind, content=content)
        self.nodes[number], self.held[number] = node, made
        return number

    def store(self, holder: int, index: int, value: int | None, how: Store = plainly) -> None:
        """Into a slot of a tuple that is held, a reference to one that is held."""
        how(self.heap, self.held[holder], 1 + index, None if value is None else self.held[value])
        self.nodes[holder].slots[index] = value

    def follow(self, holder: int, index: int) -> int | None:
        """Hold what a slot leads to."""
        value, expected = self.held[holder][1 + index], self.nodes[holder].slots[index]
        if expected is None:
            assert value is None
            return None
        assert isinstance(value, Ref)
        self.held[expected] = value
        self.compare(expected)
        return expected

    def drop(self, number: int) -> None:
        """Hold it no longer."""
        del self.held[number]

    # ---- comparing both

    def reachable(self, *roots: int) -> set[int]:
        """Numbers of all that can be reached from what is held, and from these."""
        found: set[int] = set()
        pending = [*self.held, *roots]
        while pending:
            number = pending.pop()
            if number not in found:
                found.add(number)
                pending += [each for each in self.nodes[number].slots if each is not None]
        return found

    def compare(self, number: int) -> None:
        """One that is held, with its model."""
        node, made = self.nodes[number], self.held[number]
        assert made.kind == node.kind
        if node.kind == "tuple":
            values = list(made)
            assert values[0] == number
            for value, expected in zip(values[1:], node.slots, strict=True):
                assert (value is None) == (expected is None)
                if isinstance(value, Ref):
                    assert value[0] == expected if value.kind != "bytes" else number_of(value) == expected
        else:
            assert bytes(made) == number.to_bytes(8, "little") + node.content

    def compare_all(self) -> None:
        """Everything that can be reached, by walking there."""
        before, done = set(self.held), set[int]()
        pending = list(self.held)
        while pending:
            number = pending.pop()
            if number in done:
                continue
            done.add(number)
            self.compare(number)
            for index in range(len(self.nodes[number].slots)):
                child = self.follow(number, index)
                if child is not None and child not in done:
                    pending.append(child)
        assert done == self.reachable()
        for number in done - before:
            self.drop(number)

    def listed(self) -> dict[int, str]:
        """What the heap says is there of this graph: numbers, and in which generation."""
        found: dict[int, str] = {}
        for each in self.heap.objects():
            number = each.first >> 1 if each.kind == "tuple" else each.first
            assert number not in found, f"object {number} is there twice"
            found[number] = each.generation
        return found

    def forget_freed(self, there: dict[int, str]) -> None:
        """What is not there any more is no longer in the model, since nothing that is there leads to it."""
        self.nodes = {number: node for number, node in self.nodes.items() if number in there}


def number_of(value: Ref) -> int:
    with value.contents() as view:
        return int.from_bytes(view[:8], "little")


def child(holder: Ref, index: int) -> Ref:
    """What a slot holds, which is a reference."""
    value = holder[index]
    assert isinstance(value, Ref)
    return value
