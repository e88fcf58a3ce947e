# SPDX-License-Identifier: MIT
"""A generational collector without a write barrier in its stores: the page tables remember them.

The old generation lives in tracked memory. A minor collection must find every old slot that points into the nursery;
such a slot was stored since the last minor collection, so it is in a dirty page, and only those are searched. Run it
as ``python examples/gc_write_barrier.py``; each collection is checked against a search of the whole old generation.
"""

from __future__ import annotations

import mmap
import random
import sys
from collections.abc import Iterable

import dirtytrack

CELL = 2  # words a cell: value, next
OLD_CELLS = 1 << 20  # 16 MiB
NURSERY_CELLS = 1 << 12
NURSERY = 1 << 32  # references from here on are nursery cells; below, cells of the old generation; 0 is nil
PAGE_WORDS = mmap.PAGESIZE // 8
LISTS = 50_000  # long-lived lists whose heads are old cells
COLLECTIONS = 20


class Heap:
    """Two generations of cells. `cons` and `set_next` are what a mutator calls: plain stores, nothing else."""

    def __init__(self, memory: dirtytrack.Memory) -> None:
        self.old = memoryview(memory).cast("Q")
        self.old_top = 1
        self.young = memoryview(bytearray(NURSERY_CELLS * CELL * 8)).cast("Q")
        self.young_top = 0

    def cons(self, value: int, following: int) -> int:
        cell = self.young_top
        self.young_top += 1
        self.young[cell * CELL], self.young[cell * CELL + 1] = value, following
        return NURSERY + cell

    def old_cons(self, value: int, following: int) -> int:
        cell = self.old_top
        self.old_top += 1
        self.old[cell * CELL], self.old[cell * CELL + 1] = value, following
        return cell

    def set_next(self, cell: int, following: int) -> None:
        self.old[cell * CELL + 1] = following

    def roots(self, pages: Iterable[int]) -> list[int]:
        """The slots (indexes of words) in these pages of the old generation that hold nursery references."""
        found = []
        for page in pages:
            first = page * PAGE_WORDS
            words = self.old[first : first + PAGE_WORDS].tolist()
            found += [first + i for i in range(1, PAGE_WORDS, CELL) if words[i] >= NURSERY]
        return found

    def minor(self, roots: list[int]) -> int:
        """Moves what `roots` reach into the old generation and empties the nursery; returns the cells moved."""
        before, moved = self.old_top, dict[int, int]()
        for slot in roots:
            while (reference := self.old[slot]) >= NURSERY:
                seen = reference in moved
                if not seen:
                    at = (reference - NURSERY) * CELL
                    moved[reference] = self.old_cons(self.young[at], self.young[at + 1])
                self.old[slot] = moved[reference]
                if seen:
                    break
                slot = moved[reference] * CELL + 1  # the rest of the list
        self.young_top = 0
        return self.old_top - before

    def values(self, cell: int) -> list[int]:
        found = []
        while cell := self.old[cell * CELL + 1]:
            found.append(self.old[cell * CELL])
        return found


def main() -> int:
    chance = random.Random(1)
    memory = dirtytrack.allocate(OLD_CELLS * CELL * 8, name="old")
    all_pages = range(len(memory) // mmap.PAGESIZE)
    heap = Heap(memory)
    heads = [heap.old_cons(0, 0) for _ in range(LISTS)]
    truth: dict[int, list[int]] = {head: [] for head in heads}
    searched = moved = 0
    with dirtytrack.track({"old": memory}) as tracker:
        for number in range(COLLECTIONS):
            hot = chance.sample(heads[:5_000], 30) + chance.sample(heads, 5)
            while heap.young_top + 2 <= NURSERY_CELLS:
                garbage, kept = chance.random(), chance.randrange(1 << 20)
                cell = heap.cons(kept, 0)
                if garbage < 0.1:
                    head = chance.choice(hot)
                    heap.young[(cell - NURSERY) * CELL + 1] = heap.old[head * CELL + 1]
                    heap.set_next(head, cell)  # the store that a write barrier would have to watch
                    truth[head].insert(0, kept)
            pages = tracker.collect().pages("old").tolist()  # stored to since the last collection
            roots = heap.roots(pages)
            if roots != heap.roots(all_pages):
                print(f"collection {number}: the dirty pages do not hold every root")
                return 1
            searched += len(pages)
            moved += heap.minor(roots)
    print(f"{COLLECTIONS} minor collections searched {searched / COLLECTIONS:.0f} of {len(all_pages)} pages each")
    ok = moved > 0 and not heap.roots(all_pages) and all(heap.values(head) == truth[head] for head in heads)
    print(f"{moved} cells moved: {'every list identical' if ok else 'lists DIFFER'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
