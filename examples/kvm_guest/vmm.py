# SPDX-License-Identifier: MIT
"""A small virtual machine monitor: runs a guest in a thread, stops it, keeps it to a rate, saves and loads it."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from . import guest
from .kvm import EXIT_HLT, EXIT_IO, Machine

if TYPE_CHECKING:
    from typing_extensions import Self

    import dirtytrack

KICK = signal.SIGUSR1


class GuestLost(Exception):
    """The guest says that its memory is not what it wrote, or it did what its program does not."""


class Vmm:
    """A machine with that memory, which has no guest yet: `boot` or `load` one, then `resume`.

    Args:
        ram: its memory.

    Raises:
        NoKvm: this host makes no virtual machines.

    Thread safety: all of it from any thread. Made in the main thread, which is where Python handles signals.
    """

    def __init__(self, ram: dirtytrack.Memory) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(KICK, lambda *_: None)  # it ends the ioctl in which the guest runs, and no more
        self.machine = Machine(ram)
        self.told = 0
        """The last number that the guest told us."""
        self.heard: list[tuple[float, int]] = []
        """The first and the last number that it told in each time that it ran, and when (time.monotonic)."""
        self._rate, self._share = 0.0, 1.0
        self._change = threading.Condition()
        self._wanted = self._running = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vcpu", daemon=True)
        self._thread.start()

    # ---- what others ask of it

    def boot(self, numbers_per_second: float = 0.0, burst: int = 200) -> None:
        """Begin with the guest's program.

        Args:
            numbers_per_second: how fast it may write; 0: as fast as it can.
            burst: after how many numbers it tells us.
        """
        self._rate = numbers_per_second
        guest.boot(self.machine, burst)

    def load(self, state: bytes) -> None:
        """Go on as another did, whose memory this is. Raises ValueError if that is no state."""
        loaded = guest.State.unpack(state)
        guest.load(self.machine, loaded)
        self.told, self._rate = loaded.told, loaded.numbers_per_second

    def resume(self) -> None:
        """Let it run."""
        self.require()
        with self._change:
            self._wanted = True
            self.machine.leave(False)
            self._change.notify_all()

    def pause(self) -> None:
        """Stop it, and return when it has stopped: between two instructions, with nothing half done."""
        with self._change:
            self._wanted = False
            self._change.notify_all()
            while self._running:
                # In this order: a signal that comes before the ioctl is answered by the ioctl itself.
                self.machine.leave(True)
                with suppress(ProcessLookupError):
                    signal.pthread_kill(self._thread.ident or 0, KICK)
                self._change.wait(0.05)
        self.require()

    def slow(self, step: float) -> None:
        """Have it run for a share of the time only: 0 as before, 0.99 hardly."""
        with self._change:
            self._share = 1.0 - step
            self._change.notify_all()

    def state(self) -> bytes:
        """Everything but its memory; it must not run."""
        return guest.save(self.machine, self.told, self._rate).pack()

    def close(self) -> None:
        """End the guest."""
        with suppress(GuestLost):
            self.pause()
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self.machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def require(self) -> None:
        """Raises GuestLost if it has stopped by itself."""
        if self._error is not None:
            raise GuestLost(str(self._error)) from self._error

    # ---- the thread in which it runs

    def _run(self) -> None:
        try:
            while self._wait():
                self._burst()
        except BaseException as error:
            with self._change:
                self._error, self._wanted, self._running = error, False, False
                self._change.notify_all()

    def _wait(self) -> bool:
        """Until it is to run. False: never again."""
        with self._change:
            if not self._wanted and self._running:
                # What the guest asked of us last ends when KVM is entered again: then only are its registers true.
                self.machine.leave(True)
                self.machine.run()
                self._running = False
                self._change.notify_all()
            self._change.wait_for(lambda: self._wanted or self._closed)
            if self._wanted and not self._running:
                self._running, self._due, self._first = True, time.monotonic(), True
            return self._wanted

    def _burst(self) -> None:
        began = time.monotonic()
        why = self.machine.run()
        if why == 0:
            return
        if why != EXIT_IO:
            raise GuestLost("the guest has stopped" if why == EXIT_HLT else f"the guest left for reason {why}")
        port, number = self.machine.told()
        if port != guest.TOLD_PORT:
            raise GuestLost(f"at number {number} a page was not what the guest had written to it")
        count = (number - self.told) % 2**32
        self.told += count
        now = time.monotonic()
        self._note(now)
        self._pace(count, began, now)

    def _note(self, now: float) -> None:
        if self._first:
            self._first = False
            self.heard += [(now, self.told), (now, self.told)]
        self.heard[-1] = now, self.told

    def _pace(self, count: int, began: float, now: float) -> None:
        """Sleep for as long as the rate wants, unless somebody wants something else."""
        pause = (now - began) * (1 / self._share - 1)
        if self._rate:
            self._due += count / (self._rate * self._share)
            pause = max(pause, self._due - now)
        if pause > 0:
            with self._change:
                self._change.wait_for(lambda: not self._wanted, pause)
