# SPDX-License-Identifier: MIT
"""The watcher of a frozen cgroup: a program of its own, which thaws it should the tracker die.

Run by `dirtytrack.process.freezer`, never imported: descriptors of the group's cgroup.freeze and of a pidfd of the
tracker. What comes through its standard input says that the tracker has thawed it itself.
"""

import os
import select
import signal
import sys

__all__ = ["main"]


def main(freeze: int, tracker: int) -> int:
    """Wait for a word of the tracker, or for its end; the exit status."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what ends a whole group of processes ends the tracker first
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(tracker, select.POLLIN)  # readable once it has ended: pidfd_open(2)
    os.write(1, b"\n")
    ready = dict(poller.poll())
    # A child that the tracker forked may hold the other end of our input: only its end is no news of it.
    if not (0 in ready and os.read(0, 1)):
        os.write(freeze, b"0")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
