# SPDX-License-Identifier: MIT
"""Rounds: for each save, every rank says how its part went, and hears what came of all of them."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import CheckpointerClosed, RankFailed, RankLost, RanksDisagree
from ..bell import Bell
from ..crew import Worker
from .communicators import all_gathered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ..manifests import Manifest
    from .communicators import Communicator

__all__ = ["Rounds", "Verdict", "agreed", "as_failed", "as_left", "as_nothing", "as_prepared", "named_ranks"]

_MOST_WORDS = 2000  # of an error that travels
_MOST_VERDICTS = 64


def named_ranks(ranks: Sequence[int]) -> str:
    """Ranks in words, however many there are."""
    shown = ", ".join(map(str, ranks if len(ranks) <= 8 else ranks[:7]))
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{' and more' if len(ranks) > 8 else ''}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MOST_WORDS]


@contextmanager
def _reaching(doing: str) -> Iterator[None]:
    """What a communicator raises, in our words: nobody knows what it raises when ranks are lost."""
    try:
        yield
    except Exception as error:
        raise RankLost(f"the other ranks could not be reached to {doing}: {_words(error)}") from error


def agreed(comm: Communicator, doing: str, work: Callable[[], Any]) -> list[Any]:
    """Do something at every rank, and go on only if each could. All ranks call this.

    Args:
        comm: by what they talk.
        doing: what it is, as in "open the store".
        work: returns what JSON has a word for.

    Returns:
        What each rank's work returned, by rank.

    Raises:
        RankFailed: it failed at another rank.
        RankLost: the ranks do not reach one another.
        Whatever the work raised here.
    """
    problem: BaseException | None = None
    try:
        mine = {"done": work()}
    except BaseException as error:
        problem, mine = error, {"failed": _words(error)}
    try:
        with _reaching(doing):
            found = [json.loads(each) for each in all_gathered(comm, json.dumps(mine).encode())]
    except RankLost:
        if problem is None:
            raise
    if problem is not None:
        raise problem
    failed = [rank for rank, each in enumerate(found) if "failed" in each]
    if failed:
        raise RankFailed(f"{named_ranks(failed)} could not {doing}: {found[failed[0]]['failed']}", ranks=tuple(failed))
    return [each["done"] for each in found]


# ---- what is said


def as_prepared(manifest: Manifest, how: Mapping[str, str], rank: int) -> dict[str, Any]:
    """That a rank's part is durable.

    Args:
        manifest: of the part.
        how: the buffers that are shared between ranks, and how.
        rank: whose it is; what is the same at all is said once, by rank 0.
    """
    said = _at_step(manifest.generation, manifest.meta, how, rank, manifest.page_bytes)
    return said | {
        "kind": manifest.kind,
        "regions": [[region.name, region.nbytes, region.dtype, region.shape] for region in manifest.regions],
        "store_id": manifest.store_id,
        "written_nbytes": sum(each.nbytes for each in manifest.segments if each.generation == manifest.generation),
        "stored_nbytes": manifest.stored_nbytes,
        "segment_count": len(manifest.segments),
    }


def as_nothing(generation: int, meta: Any, how: Mapping[str, str], rank: int, page_bytes: int) -> dict[str, Any]:
    """That a rank has no part, and comes along all the same."""
    return _at_step(generation, meta, how, rank, page_bytes) | {"kind": None, "regions": []}


def _at_step(generation: int, meta: Any, how: Mapping[str, str], rank: int, page_bytes: int) -> dict[str, Any]:
    said = {
        "generation": generation,
        "says": "prepared",
        "meta_sha256": sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest(),
        "how": dict(how),
    }
    return said if rank else said | {"meta": meta, "created": time.time(), "page_bytes": page_bytes}


def as_failed(error: BaseException) -> dict[str, Any]:
    """That a rank's part could not be saved."""
    return {"says": "failed", "why": _words(error), "errno": getattr(error, "errno", None)}


def as_left(error: BaseException | None) -> dict[str, Any]:
    """That a rank saves no more."""
    return {"says": "left", "why": None if error is None else _words(error)}


# ---- what is heard


class Verdict(NamedTuple):
    """What came of a round."""

    kind: str
    """``"committed"``, ``"failed"``, ``"disagree"`` or ``"left"``: a rank saves no more, so that no rank does."""
    ranks: tuple[int, ...] = ()
    """Of whom that is so."""
    says: str = ""
    errno: int | None = None
    kept: tuple[tuple[int, int], ...] = ()
    """The generations that there are, from and to, where it was committed."""

    def encode(self) -> bytes:
        """As it travels."""
        return json.dumps(self._asdict()).encode()

    @staticmethod
    def decode(data: bytes) -> Verdict:
        """What has travelled."""
        given = json.loads(data)
        given["ranks"] = tuple(given["ranks"])
        given["kept"] = tuple((first, last) for first, last in given["kept"])
        return Verdict(**given)

    def keeps(self, generation: int) -> bool:
        """Whether that generation is there."""
        return any(first <= generation <= last for first, last in self.kept)

    def problem(self, generation: int, rank: int) -> Exception | None:
        """The error that it is for a rank."""
        if self.kind == "committed":
            return None
        message = f"generation {generation} was not saved by any rank, because "
        if self.kind == "disagree":
            return RanksDisagree(message + self.says)
        who = "this rank" if self.ranks == (rank,) else named_ranks(self.ranks)
        if self.kind == "left":
            message += f"{who} saves no more{f' ({self.says})' if self.says else ''}, and all save together: close this"
        else:
            message += f"{who} could not save its part: {self.says}. What was written since is in the next save"
        return RankFailed(message, ranks=self.ranks, generation=generation, errno=self.errno)


class Rounds:
    """One round for each save, in the order of the generations, which are numbered by it: the same at each rank.

    Rounds are held by a thread that is there only while this rank has something to say: whoever waits for what comes of
    one can give up, which a thread that waits for other ranks cannot. If they are not reached, no further one is held.

    Args:
        comm: by what they talk.
        first: the generation of the first round.
        decide: at rank 0, from what all ranks said to what comes of it.

    Thread safety: everything may be called from any thread.
    """

    def __init__(
        self, comm: Communicator, first: int, decide: Callable[[int, list[dict[str, Any]]], Verdict] | None
    ) -> None:
        self.comm = comm
        self._decide = decide
        self._bell = Bell()
        self._mutex = self._bell.mutex
        self._begun = self._next = first
        self._said: dict[int, dict[str, Any]] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._committed: tuple[int, Verdict] | None = None
        self._holder: Worker | None = None
        self._over: Exception | None = None
        """Why nothing is begun, or waited for, any more."""
        self._silent = False
        """Whether nothing is said any more: what was said before this rank gave up is said all the same."""

    @property
    def over(self) -> Exception | None:
        """Why no further round is held, where that is so."""
        return self._over

    @property
    def committed(self) -> int | None:
        """The last generation that all ranks have saved, in these rounds."""
        return None if self._committed is None else self._committed[0]

    def keeps(self, generation: int) -> bool:
        """Whether that generation of a part may be needed: by a generation that there is, or one that is to come."""
        committed = self._committed
        return committed is None or generation > committed[0] or committed[1].keeps(generation)

    def begin(self) -> int:
        """The generation of the next save. Something must be said of it then.

        Raises:
            RankFailed, RankLost: no further round is held.
        """
        with self._mutex:
            if self._over is not None:
                raise self._over
            generation, self._begun = self._begun, self._begun + 1
            return generation

    def say(self, generation: int, said: dict[str, Any]) -> None:
        """What this rank has to say of a generation; what it said first counts."""
        with self._mutex:
            if generation < self._next or generation in self._said:
                return
            self._said[generation] = said
            if self._holder is not None or self._silent or self._next not in self._said:
                return  # it is a holder's already, or will be, or nobody's
            holder = self._holder = Worker(target=lambda: self._hold(holder), name="dirtytrack-ranks", daemon=True)
        try:
            holder.start()
        except RuntimeError:  # no more threads are to be had; but we are one
            self._hold(holder)
        except BaseException:  # should it run all the same, it sees that it is not the one
            with self._mutex:
                self._silent, self._holder = True, None
                self._over = RankLost("talking to the other ranks was interrupted as it began")
                self._bell.ring()
            raise

    def _hold(self, me: Worker) -> None:
        while True:
            with self._mutex:
                if self._holder is not me:
                    return
                generation = self._next
                if self._silent or generation not in self._said:
                    self._holder = None
                    return
                said = self._said[generation]
            verdict: Verdict | None = None
            over: Exception | None = None
            try:
                with _reaching(f"commit generation {generation}"):
                    verdict = self._held(generation, said)
                if verdict.kind == "left":
                    over = verdict.problem(generation, self.comm.rank)
            except RankLost as error:
                over = error
            with self._mutex:
                if over is not None:
                    self._silent, self._over = True, self._over or over
                if verdict is not None:
                    self._next = generation + 1
                    self._said.pop(generation)
                    self._verdicts[generation] = verdict
                    self._verdicts.pop(generation - _MOST_VERDICTS, None)
                    if verdict.kind == "committed":
                        self._committed = generation, verdict
                self._bell.ring()

    def _held(self, generation: int, said: dict[str, Any]) -> Verdict:
        found = self.comm.gather(json.dumps(said).encode())
        if found is None:
            return Verdict.decode(self.comm.broadcast(b""))
        assert self._decide is not None, "rank 0 decides"
        try:
            verdict = self._decide(generation, [json.loads(each) for each in found])
        except BaseException as error:  # the others must have an answer
            verdict = Verdict("failed", (0,), _words(error), getattr(error, "errno", None))
        self.comm.broadcast(verdict.encode())
        return verdict

    def verdict(self, generation: int) -> Verdict:
        """Wait for what comes of a generation that something was said of.

        Raises:
            RankLost, RankFailed: nothing will, since no further round is held.
        """
        self._bell.wait_for(lambda: generation in self._verdicts or self._over is not None)
        with self._mutex:
            found = self._verdicts.get(generation)
            if found is None:
                assert self._over is not None
                raise self._over
            return found

    def commit(self, generation: int, said: dict[str, Any]) -> None:
        """Say that a part is prepared, and wait until all are, and it is committed.

        Raises:
            RankFailed, RanksDisagree: it was not, anywhere.
            RankLost: nobody here knows.
        """
        self.say(generation, said)
        problem = self.verdict(generation).problem(generation, self.comm.rank)
        if problem is not None:
            raise problem

    def leave(self, error: BaseException | None, timeout: float | None = None) -> bool:
        """Say that this rank saves no more, where that is still to be said, and wait until all have heard it.

        Args:
            error: why, where that is not as it should be.
            timeout: seconds. When they are over nothing is waited for any more, by nobody: other ranks may wait for
                this one, for something else.

        Returns:
            Whether all leave with it.
        """
        verdict: Verdict | None = None
        try:
            generation = self.begin()
            self.say(generation, as_left(error))
            if self._bell.wait_for(lambda: generation in self._verdicts or self._over is not None, timeout):
                verdict = self.verdict(generation)
        except (RankFailed, RankLost):
            pass
        with self._mutex:
            self._over = CheckpointerClosed("this is closed: make another one, with resume=True to go on")
            if verdict is None:
                self._over = RankLost("this rank has left, and heard nothing of the others")
            self._bell.ring()
        return verdict is not None and len(verdict.ranks) == self.comm.size
