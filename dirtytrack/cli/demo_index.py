# SPDX-License-Identifier: MIT
"""The demo's application: an inverted index that lives wholly in one buffer, so that a copy of the buffer is an index.

=========== ================================================================================================
header      one page: magic, how many files, terms and postings, where the three areas below are filled to
directory   a hash table, open addressing: where the term's record is, or 0
terms       records, in order of first appearance: hash, length, files, occurrences, newest posting, the term
documents   records: lengths of path and text, the path, the text
postings    records: the term's previous posting, the document, how many lines, the lines
=========== ================================================================================================

Records begin at multiples of 4 and are named by their offset / 4 (never 0, that is the header), 32 bits each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .demo_parse import Document

__all__ = ["Area", "Index", "IndexFull", "Term", "WriteLog"]

_MAGIC = b"dt-index"
_HEADER = Struct("=8s7Q")
_TERM = Struct("=5I")
_TERM_USE = Struct("=3I")  # the part of a term's record that changes
_DOCUMENT = Struct("=2I")
_POSTING = Struct("=3I")
_NUMBER = Struct("=I")
_HEADER_BYTES = 4096


class IndexFull(Exception):
    """An area has no room for what is to be added."""


class Area(NamedTuple):
    """A part of the buffer, in bytes."""

    name: str
    start: int
    end: int


class Term(NamedTuple):
    """What the index knows of one term before any posting is read."""

    files: int
    occurrences: int
    newest: int


class WriteLog:
    """Every store of an epoch in order: pairs of offset and length, and the bytes."""

    def __init__(self) -> None:
        self.spans = array("Q")
        self.data = bytearray()


def _areas(nbytes: int) -> tuple[Area, ...]:
    slots = 1 << ((nbytes >> 9).bit_length() - 1)
    ends = [_HEADER_BYTES, _HEADER_BYTES + 4 * slots, nbytes // 8, nbytes // 16 * 9, nbytes]
    names = ("header", "directory", "terms", "documents", "postings")
    return tuple(Area(name, start, end) for name, start, end in zip(names, [0, *ends], ends, strict=False))


class Index:
    """An inverted index in a buffer: tokens, and where in which source file they are.

    Args:
        buffer: Zeroes (a new index) or what an index wrote, here or in the buffer that this is a copy of.
    """

    def __init__(self, buffer: Buffer) -> None:
        view = memoryview(buffer).cast("B")
        self._view = view
        self.areas = _areas(view.nbytes)
        self._terms_end: int
        self._documents_end: int
        self._postings_end: int
        _, directory, terms, documents, postings = self.areas
        self._slots = view[directory.start : directory.end].cast("I")
        self._directory = directory.start
        self.log = WriteLog()
        magic, nbytes, *counts = _HEADER.unpack_from(view)
        if magic == _MAGIC and nbytes == view.nbytes:
            self.files, self.terms, self.postings, self._terms_end, self._documents_end, self._postings_end = counts
        else:
            self.files = self.terms = self.postings = 0
            self._terms_end, self._documents_end, self._postings_end = terms.start, documents.start, postings.start
        self._terms_limit, self._documents_limit, self._postings_limit = terms.end, documents.end, postings.end

    @property
    def used_bytes(self) -> int:
        """What the areas hold; the directory counts whole."""
        _, directory, terms, documents, postings = self.areas
        grown = self._terms_end - terms.start + self._documents_end - documents.start
        return directory.end + grown + self._postings_end - postings.start

    # ---- writing ----

    def start_log(self) -> WriteLog:
        """Begin a new log of stores; returns the one so far."""
        done, self.log = self.log, WriteLog()
        return done

    def _write(self, offset: int, data: bytes) -> None:
        length = len(data)
        self._view[offset : offset + length] = data
        self.log.spans.append(offset)
        self.log.spans.append(length)
        self.log.data += data

    def add(self, document: Document) -> None:
        """Store a document and add its terms.

        Raises:
            IndexFull: An area is full.
        """
        number = self._add_text(document)
        pack, unpack_from, unite = _POSTING.pack, _TERM.unpack_from, _TERM_USE.pack
        write, view = self._write, self._view
        end = self._postings_end
        for term, lines in document.terms.items():
            record = self._find_or_add(term)
            _, _, files, occurrences, newest = unpack_from(view, record)
            count = len(lines) // 4
            if end + 12 + len(lines) > self._postings_limit:
                raise IndexFull(f"no room for more postings in {self._view.nbytes >> 20} MiB")
            write(end, pack(newest, number, count) + lines)
            write(record + 8, unite(files + 1, occurrences + count, end >> 2))
            end += 12 + len(lines)
            self.postings += count
        self._postings_end = end
        self.files += 1
        counts = (self.files, self.terms, self.postings, self._terms_end, self._documents_end, end)
        write(0, _HEADER.pack(_MAGIC, self._view.nbytes, *counts))

    def _add_text(self, document: Document) -> int:
        path, text = document.path.encode("utf-8", "surrogateescape"), document.text
        record = _DOCUMENT.pack(len(path), len(text)) + path + text
        offset = self._documents_end
        end = offset + (len(record) + 3 & ~3)
        if end > self._documents_limit:
            raise IndexFull(f"no room for more documents in {self._view.nbytes >> 20} MiB")
        self._write(offset, record)
        self._documents_end = end
        return offset >> 2

    def _probe(self, term: bytes, digest: int) -> tuple[int, int]:
        """The term's slot and record; record 0 where it is new, and the slot is where it belongs."""
        slots, view, length = self._slots, self._view, len(term)
        mask = len(slots) - 1
        slot = digest & mask
        while record := slots[slot] << 2:
            known, known_length = _TERM_USE.unpack_from(view, record)[:2]
            if known == digest and known_length == length and view[record + 20 : record + 20 + length] == term:
                break
            slot = slot + 1 & mask
        return slot, record

    def _find_or_add(self, term: bytes) -> int:
        digest = crc32(term)
        slot, record = self._probe(term, digest)
        if record:
            return record
        record = self._terms_end
        end = record + (20 + len(term) + 3 & ~3)
        if end > self._terms_limit or self.terms >= len(self._slots) // 8 * 7:
            raise IndexFull(f"no room for more terms in {self._view.nbytes >> 20} MiB")
        self._write(record, _TERM.pack(digest, len(term), 0, 0, 0) + term)
        self._write(self._directory + 4 * slot, _NUMBER.pack(record >> 2))
        self._terms_end = end
        self.terms += 1
        return record

    # ---- reading ----

    def find(self, term: str) -> Term:
        """How often a term occurs; all zeroes where it does not."""
        encoded = term.encode()
        _, record = self._probe(encoded, crc32(encoded))
        return Term(*_TERM.unpack_from(self._view, record)[2:]) if record else Term(0, 0, 0)

    def places(self, term: str) -> Iterator[tuple[int, set[int]]]:
        """The documents with a term, newest first, and the lines that it is on."""
        posting = self.find(term).newest
        while posting:
            offset = posting << 2
            posting, document, count = _POSTING.unpack_from(self._view, offset)
            yield document, set(self._view[offset + 12 : offset + 12 + 4 * count].cast("I"))

    def together(self, *terms: str) -> dict[int, set[int]]:
        """The lines that have all the terms, by document."""
        first, *rest = (dict(self.places(term)) for term in terms)
        found = {}
        for document, lines in first.items():
            for other in rest:
                lines = lines & other.get(document, set())
            if lines:
                found[document] = lines
        return found

    def path(self, document: int) -> str:
        """A document's path."""
        path_bytes, _ = _DOCUMENT.unpack_from(self._view, document << 2)
        start = (document << 2) + 8
        return bytes(self._view[start : start + path_bytes]).decode("utf-8", "surrogateescape")

    def line(self, document: int, number: int) -> str:
        """One line of a document, from 1."""
        path_bytes, text_bytes = _DOCUMENT.unpack_from(self._view, document << 2)
        start = (document << 2) + 8 + path_bytes
        text = bytes(self._view[start : start + text_bytes])
        return text.splitlines()[number - 1].decode("utf-8", "replace").strip()
