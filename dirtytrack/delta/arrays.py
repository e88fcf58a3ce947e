# SPDX-License-Identifier: MIT
"""Which elements of an array changed since the last time, without hooks in the program that changes them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InvalidMemory
from .encoded import Delta, itemsize_and_shape, require_question
from .mirror import Mirror

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["ArrayChanges", "array_changes"]


class ArrayChanges:
    """An array that is watched; made by `array_changes`. Calling it is `ArrayChanges.changed`.

    Thread safety: as `Mirror`.
    """

    def __init__(self, array: Any, options: dict[str, Any]) -> None:
        itemsize, _ = itemsize_and_shape(array)
        self._array = array
        self._address = _address_of(array)
        self._mirror = Mirror(_buffer_of(array), granule=itemsize & -itemsize, **options)

    def changed(self, what: Literal["elements", "rows", "mask"] = "elements") -> memoryview:
        """Exactly the elements whose bytes are other than the last time.

        Args:
            what: ``"elements"``: flat indexes. ``"rows"``: indexes along the first axis. ``"mask"``: one bool an
                element, in the array's shape.

        Returns:
            As `Delta.changed`.

        Raises:
            InvalidMemory: the array, moved to other memory, has another length there; or as `Delta.changed`.
            RegionGone, NotStarted, SessionClosed, UsedAfterFork.
        """
        require_question(what)  # before anything is taken
        return self.update().changed(self._array, what)

    __call__ = changed

    def update(self) -> Delta:
        """The same as a delta, for whoever wants several answers about one interval, or the bytes. Raises like
        `ArrayChanges.changed`."""
        address = _address_of(self._array)
        if address == self._address:
            return self._mirror.update()
        delta = self._mirror.move_to(_buffer_of(self._array))
        self._address = address
        return delta

    @property
    def mirror(self) -> Mirror:
        """The copy, as of the last time."""
        return self._mirror

    def close(self) -> None:
        """Stop watching."""
        self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def array_changes(array: Any, **options: Any) -> ArrayChanges:
    """Watch an array: which of its elements changed since the last time that one asked, whoever changed them.

    What counts is the bytes: an element that was stored to but not changed is left out, and so is one that changed and
    changed back. Only pages that were written are compared.

    Args:
        array: a NumPy array, a PyTorch tensor on the CPU, or any writable, C-contiguous buffer. Neither package is
            imported. A tensor that is given other memory (``p.data = x``) is followed there and compared as a whole; a
            name that is given another tensor (``module.weight = Parameter(x)``) is not.
        options: of `track`.

    Raises:
        InvalidMemory: not contiguous, read-only, empty, or on another device.
        PermissionDenied, UnsupportedKernel, RangeBusy, LimitReached: as `track`.
    """
    return ArrayChanges(array, options)


def _is_tensor(array: Any) -> bool:
    return hasattr(array, "data_ptr") and hasattr(array, "element_size")


def _address_of(array: Any) -> int:
    """Where a tensor is now; 0 for what cannot move while its buffer is held."""
    return int(array.data_ptr()) if _is_tensor(array) else 0


def _buffer_of(array: Any) -> Any:
    """An object with the buffer protocol. A tensor's bytes, since NumPy does not know all of its types (bfloat16)."""
    if not _is_tensor(array):
        return array
    if array.device.type != "cpu":
        raise InvalidMemory(f"this tensor is on {array.device}: watch the memory on the CPU that it is copied to")
    if not array.numel():
        raise InvalidMemory("this tensor is empty")
    return array.detach().reshape(-1).view(sys.modules["torch"].uint8).numpy()
