# SPDX-License-Identifier: MIT
"""Analyses against the obvious model (sets of pages), plans against a simulated migration, units. No kernel needed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtytrack.errors import InvalidRecording, KernelRefused, PermissionDenied
from dirtytrack.observe import (
    Epoch,
    Metrics,
    RecordingWriter,
    Trace,
    by_mapping,
    checkpoints,
    exact_tail,
    only,
    precopy,
    rates,
)
from dirtytrack.observe.metrics import address_of
from dirtytrack.observe.records import EpochRecord
from dirtytrack.observe.units import (
    bandwidth_of,
    bytes_of,
    seconds_of,
    show_bandwidth,
    show_bytes,
    show_seconds,
)
from dirtytrack.observe.written import Written
from dirtytrack.process import Mapping
from tests.oracle import PAGE
from tests.recorded import BASE, mapping, pages_of, runs_of
from tests.strategies import page_sets

PAGES = 120
SHIFT = PAGE.bit_length() - 1
Pages = frozenset[int]


def epochs_of(
    history: list[Pages],
    table: tuple[Mapping, ...] = (),
    *,
    seconds: float = 0.1,
    resident_pages: int = 0,
    collect_seconds: float = 0.0,
) -> list[Epoch]:
    ns = round(seconds * 1e9)
    return [
        Epoch(
            EpochRecord(
                i + 1, 1, i * ns, ns, round(collect_seconds * 1e9), resident_pages, Written.of(runs_of(pages), SHIFT)
            ),
            PAGE,
            table,
        )
        for i, pages in enumerate(history)
    ]


def windows(history: list[Pages], length: int) -> list[int]:
    return [len(frozenset().union(*history[i : i + length])) for i in range(len(history) - length + 1)]


# ---- the working set


@given(st.lists(page_sets(PAGES), min_size=1, max_size=12))
@settings(max_examples=30)
def test_the_working_set_is_the_mean_over_all_windows(history: list[Pages]) -> None:
    trace = Trace(epochs_of(history))
    written = trace.working_set()
    assert len(written.pages) == len(history)
    for length in range(1, len(history) + 1):
        true = windows(history, length)
        assert written.pages[length - 1] == pytest.approx(sum(true) / len(true))
        assert written(length * 0.1) == pytest.approx(sum(true) / len(true), abs=1e-6)
        assert trace.largest(length) == max(true)
        assert trace.tiles(length).tolist() == true[::length]
    assert written(0.01) == written.pages[0]
    assert written(0.1 * len(history) * 3) >= written.pages[-1]
    assert trace.page_count == len(frozenset().union(*history))


@given(st.lists(page_sets(PAGES), min_size=1, max_size=8), st.sampled_from((0.1, 0.5, 0.9, 1.0)))
@settings(max_examples=40)
def test_the_hot_set_is_the_fewest_pages_for_its_share(history: list[Pages], share: float) -> None:
    table = (mapping(0, 50, "low"), mapping(50, 80, ""))
    found = Trace(epochs_of(history, table)).hot_set(share, ranges=1000)
    times = sorted((sum(page in pages for pages in history) for page in frozenset().union(*history)), reverse=True)
    total = sum(times)
    fewest = next((n for n in range(len(times) + 1) if sum(times[:n]) >= share * total), len(times)) if total else 0
    assert (found.pages, found.of_pages) == (fewest, len(times))
    assert sum(part.end - part.start for part in found.ranges) == fewest * PAGE
    told = sum(part.share for part in found.ranges)
    assert not total or told >= share - 1e-9
    for part in found.ranges:
        first = part.start // PAGE - BASE
        assert part.mapping == ("low" if first < 50 else "[anon]" if first < 80 else "[gone]")
        pages = range(first, part.end // PAGE - BASE)
        assert part.share == pytest.approx(sum(page in seen for seen in history for page in pages) / total)


# ---- by time and by mapping


@given(st.lists(page_sets(PAGES), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=40)
def test_rates_lose_nothing(history: list[Pages], parts: int) -> None:
    found = rates(epochs_of(history), parts)
    assert len(found) == min(parts, len(history))
    assert sum(part.bytes_per_second * (part.ended - part.begun) for part in found) == pytest.approx(
        sum(map(len, history)) * PAGE
    )
    assert found[0].begun == 0
    assert found[-1].ended == pytest.approx(0.1 * len(history))
    if len(found) == len(history):
        assert [part.pages for part in found] == [len(pages) for pages in history]
    assert rates([]) == []


def test_a_pause_between_two_sessions_has_no_rate() -> None:
    one = EpochRecord(1, 1, 0, 10**9, 0, 0, Written.of(runs_of({1, 2}), SHIFT))
    other = EpochRecord(2, 1, 9 * 10**9, 10**9, 0, 0, Written.of(runs_of({3}), SHIFT))
    found = rates([Epoch(one, PAGE, ()), Epoch(other, PAGE, ())], 10)
    assert len(found) == 2
    assert [part.pages for part in found] == [2, 1]


def test_pages_by_mapping() -> None:
    heap, libc = mapping(0, 50, "[heap]"), mapping(60, 70, "libc", "untracked", "another userfaultfd has it")
    unnamed, ours = mapping(80, 90, ""), mapping(95, 100, "vdso", "excluded", "not writable")
    first, second = (heap, libc, unnamed, ours), (heap, libc, unnamed, mapping(90, 92, ""))
    history = [frozenset({1, 49, 60, 85, 119}), frozenset({1, 2, 91})]
    epochs = epochs_of(history[:1], first) + epochs_of(history[1:], second)
    found = {share.name: share for share in by_mapping(epochs)}
    assert {name: (share.pages, share.distinct_pages) for name, share in found.items()} == {
        "[heap]": (4, 3),
        "[anon]": (2, 2),
        "libc": (1, 1),
        "[gone]": (1, 0),
    }
    assert (found["[anon]"].mappings, found["[anon]"].nbytes) == (2, 12 * PAGE)
    assert found["libc"].untracked == "another userfaultfd has it"
    assert sum(share.share for share in found.values()) == pytest.approx(1)
    assert by_mapping(epochs)[0].name == "[heap]"


def test_regions_that_overlap_share_nothing_twice() -> None:
    table = (mapping(0, 50, "all"), mapping(10, 20, "within"), mapping(40, 60, "across"), mapping(60, 70, "next"))
    found = {share.name: share for share in by_mapping(epochs_of([frozenset(range(5, 65))] * 2, table))}
    assert {name: (share.pages, share.distinct_pages) for name, share in found.items()} == {
        "all": (90, 45),
        "within": (0, 0),
        "across": (20, 10),
        "next": (10, 5),
    }


@given(page_sets(PAGES), st.sets(st.integers(1, PAGES), max_size=6), st.integers(0, 4))
def test_by_mapping_loses_nothing(pages: Pages, cuts: set[int], unit_log2: int) -> None:
    ordered = [0, *sorted(cuts), PAGES]
    table = tuple(
        mapping(first, last, "ab"[i % 2]) for i, (first, last) in enumerate(pairwise(ordered)) if last > first
    )
    record = EpochRecord(1, 1, 0, 10**9, 0, 0, Written.of(runs_of(pages), SHIFT).coarser(unit_log2))
    found = by_mapping([Epoch(record, PAGE, table), *epochs_of([pages], table)])
    assert sum(share.pages for share in found) == 2 * len(pages)
    if not unit_log2:
        inside = [
            (each.name, page) for page in pages for each in table if each.start <= (BASE + page) * PAGE < each.end
        ]
        told = {share.name: share for share in found}
        assert all(told[name].distinct_pages == sum(each == name for each, _ in inside) for name in told)


@given(page_sets(PAGES), st.sets(st.integers(1, PAGES), max_size=6))
def test_only_some_mappings(pages: Pages, cuts: set[int]) -> None:
    ordered = [0, *sorted(cuts), PAGES]
    table = tuple(
        mapping(first, last, ("wanted/a", "other", "wanted/b")[i % 3])
        for i, (first, last) in enumerate(pairwise(ordered))
        if last > first
    )
    (found,) = only(epochs_of([pages], table, resident_pages=1000), "wanted/*")
    chosen = [each for each in table if each.name.startswith("wanted")]
    inside = {page for page in pages for each in chosen if each.start <= (BASE + page) * PAGE < each.end}
    assert pages_of(found.runs) == inside
    assert found.mappings == tuple(chosen)
    assert found.resident_pages == sum(each.nbytes for each in chosen) // PAGE


def test_a_filter_that_matches_nothing() -> None:
    epochs = epochs_of([frozenset({1})], (mapping(0, 9, "[heap]"), mapping(9, 12, "")))
    with pytest.raises(InvalidRecording, match=r"no mapping matches 'x\*'; there are: \[anon\], \[heap\]"):
        only(epochs, "x*")
    assert pages_of(only(epochs, "[heap]")[0].runs) == {1}


def test_only_the_newest_epochs_are_at_full_resolution() -> None:
    epochs = epochs_of([frozenset({1}), frozenset({2}), frozenset({3})])
    coarse = EpochRecord(1, 2, 0, 10**8, 0, 0, Written.of(runs_of({1}), SHIFT))
    cells = EpochRecord(3, 1, 0, 10**8, 0, 0, Written.of(runs_of({1}), SHIFT).coarser(2))
    for first in (coarse, cells):
        assert exact_tail([epochs[0], Epoch(first, PAGE, ()), *epochs[1:]]) == epochs[1:]
    assert rates([Epoch(coarse, PAGE, ()), *epochs[1:]])[0].coarse
    with pytest.raises(InvalidRecording, match="no epochs at full resolution"):
        precopy([Epoch(coarse, PAGE, ())], bandwidth=1e9, downtime=0.1)
    with pytest.raises(InvalidRecording, match="has no epochs"):
        precopy([], bandwidth=1e9, downtime=0.1)


# ---- plans


Program = Callable[[random.Random], Pages]


def steady(hot: int, cold: int, pages: int) -> Program:
    """Each tick writes so many of the hot pages and so many of all."""
    return lambda chance: frozenset(
        [chance.randrange(pages // 10) for _ in range(hot)] + [chance.randrange(pages) for _ in range(cold)]
    )


def migrated(
    history: list[Pages], begin: int, pages: int, pages_a_tick: float, most_left: float
) -> tuple[list[int], int, bool]:
    """Pre-copy as it would be done: send, note what was written meanwhile, until little is left or it grows."""
    left, rounds, at = pages, list[int](), float(begin)
    while left > most_left:
        rounds.append(left)
        first, at = at, at + left / pages_a_tick
        written: set[int] = set()
        for tick in range(int(first), max(int(at), int(first) + 1)):
            written |= history[tick % len(history)]
        before, left = left, len(written)
        if left >= before:
            return rounds, left, False
    return rounds, left, True


@pytest.mark.parametrize(
    ("program", "pages", "pages_a_tick", "most_left"),
    [
        (steady(40, 4, 4000), 4000, 200.0, 100.0),
        (steady(100, 20, 20_000), 20_000, 700.0, 800.0),
        (steady(10, 1, 3000), 3000, 50.0, 20.0),
        (steady(200, 400, 4000), 4000, 100.0, 50.0),
    ],
)
def test_pre_copy_goes_as_it_is_planned(program: Program, pages: int, pages_a_tick: float, most_left: float) -> None:
    chance = random.Random(7)
    history = [program(chance) for _ in range(600)]
    bandwidth, downtime = pages_a_tick * PAGE / 0.1, most_left / pages_a_tick * 0.1
    plan = precopy(epochs_of(history, resident_pages=pages), bandwidth=bandwidth, downtime=downtime)
    done = [migrated(history, begin, pages, pages_a_tick, most_left) for begin in range(0, 600, 60)]
    assert {converges for *_, converges in done} == {plan.converges}
    assert plan.downtime_seconds * bandwidth / PAGE <= plan.worst_downtime_seconds * bandwidth / PAGE
    if plan.converges:
        counts = [len(rounds) for rounds, _, _ in done]
        assert min(counts) <= len(plan.rounds) <= max(counts)
        sent = np.mean([sum(rounds) + left for rounds, left, _ in done])
        assert plan.nbytes / PAGE == pytest.approx(sent, rel=0.1)
        left_over = np.mean([left for _, left, _ in done])
        assert plan.downtime_seconds * bandwidth / PAGE == pytest.approx(left_over, rel=0.25)
        assert plan.downtime_seconds <= downtime
        assert "Pre-copy converges" in plan.verdict
        assert plan.least_bandwidth is not None
        assert plan.least_bandwidth <= bandwidth * 1.02
    else:
        assert "does not converge" in plan.verdict
        assert plan.least_bandwidth is not None
        faster = precopy(
            epochs_of(history, resident_pages=pages), bandwidth=plan.least_bandwidth * 1.02, downtime=downtime
        )
        assert faster.converges


def test_what_is_copied_at_once_needs_no_rounds() -> None:
    plan = precopy(epochs_of([frozenset({1})], resident_pages=10), bandwidth=1e9, downtime=1.0)
    assert (plan.converges, plan.rounds, plan.nbytes) == (True, (), 10 * PAGE)
    assert "no rounds are needed" in plan.verdict


def test_a_recording_that_is_too_coarse_or_too_short_says_so() -> None:
    busy = [frozenset(range(1000))] * 10
    plan = precopy(epochs_of(busy, resident_pages=2000), bandwidth=1e9, downtime=1e-4)
    assert not plan.converges
    assert "shorter epochs" in plan.verdict
    slow = precopy(epochs_of(busy, resident_pages=2000), bandwidth=1e5, downtime=1e-4)
    assert slow.beyond


def test_checkpoints_are_what_the_windows_have() -> None:
    chance = random.Random(1)
    history = [steady(30, 5, 2000)(chance) for _ in range(100)]
    epochs = epochs_of(history, resident_pages=2000, collect_seconds=0.001)
    plan = checkpoints(epochs, interval=1.0, bandwidth=100e6, first_write=1e-6)
    true = windows(history, 10)
    mean = sum(true) / len(true)
    assert plan.asked.pages == pytest.approx(mean)
    assert plan.largest_pages == max(true)
    assert plan.asked.seconds == pytest.approx(mean * (PAGE / 100e6 + 1e-6) + 0.001)
    assert plan.full_nbytes == 2000 * PAGE
    assert plan.asked.share_of_full == pytest.approx(plan.asked.seconds / (2000 * PAGE / 100e6))
    assert [round(each.interval_seconds / 0.1) for each in plan.intervals] == [1, 2, 4, 8, 16, 32, 64]
    assert plan.break_even_seconds is None
    assert not plan.beyond
    assert checkpoints(epochs, interval=100.0, bandwidth=100e6, first_write=1e-6).beyond
    assert "of a full copy" in plan.verdict


def test_the_break_even_is_where_the_two_cost_the_same() -> None:
    history = [frozenset(range(i * 10 % 1000, i * 10 % 1000 + 10)) for i in range(100)]  # all of it in 100 epochs
    epochs = epochs_of(history, resident_pages=1000)
    plan = checkpoints(epochs, interval=9.0, bandwidth=PAGE * 1e6, first_write=1e-6)  # a fault costs as much as a page
    assert plan.break_even_seconds == pytest.approx(5.0, abs=0.15)  # half of the pages
    assert plan.asked.share_of_full > 1
    assert "wrong tool" in plan.verdict
    assert "more often than every 5" in plan.verdict
    assert "wrong tool" not in checkpoints(epochs, interval=1.0, bandwidth=PAGE * 1e6, first_write=1e-6).verdict


def test_a_program_that_writes_everything_all_the_time() -> None:
    epochs = epochs_of([frozenset(range(1000))] * 20, resident_pages=1000)
    plan = checkpoints(epochs, interval=0.1, bandwidth=1e9, first_write=1e-6)
    assert plan.break_even_seconds == pytest.approx(0.1)
    assert plan.verdict.startswith("Tracking is the wrong tool for checkpoints every 100 ms")
    assert plan.verdict.endswith("Copy everything.")
    moved = precopy(epochs, bandwidth=1e6, downtime=1e-12)
    assert moved.least_bandwidth is None
    assert "Tracking is the wrong tool" in moved.verdict


def test_first_writes_that_slow_the_program_down_are_told() -> None:
    epochs = epochs_of([frozenset(range(1000))] * 20, resident_pages=100_000)
    plan = checkpoints(epochs, interval=0.1, bandwidth=1e9, first_write=20e-6)
    assert plan.fault_share == pytest.approx(0.2)
    assert "20% of its time" in plan.verdict
    assert "nothing in it" in checkpoints(epochs_of([frozenset()]), interval=1, bandwidth=1, first_write=0).verdict


# ---- units


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("100ms", 0.1),
        ("30s", 30),
        ("2 min", 120),
        ("1.5h", 5400),
        ("7d", 604_800),
        ("50us", 5e-5),
        ("50µs", 5e-5),
        (".5S", 0.5),
    ],
)
def test_times(words: str, seconds: float) -> None:
    assert seconds_of(words) == pytest.approx(seconds)


@pytest.mark.parametrize("words", ["", "100", "ms", "-1s", "1 fortnight", "1e3s", "0s", "nan", "1s2"])
def test_what_is_no_time(words: str) -> None:
    with pytest.raises(ValueError, match="no time") as caught:
        seconds_of(words)
    assert repr(words) in str(caught.value)


@pytest.mark.parametrize(
    ("words", "rate"),
    [("10Gbit", 1.25e9), ("10Gbit/s", 1.25e9), ("8kbps", 1000), ("1.2GB/s", 1.2e9), ("100MiB/s", 100 << 20)],
)
def test_bandwidths(words: str, rate: float) -> None:
    assert bandwidth_of(words) == pytest.approx(rate)


@pytest.mark.parametrize("words", ["10", "10G", "10GB", "0Gbit", "fast", "10Gbyte"])
def test_what_is_no_bandwidth(words: str) -> None:
    with pytest.raises(ValueError, match="no bandwidth"):
        bandwidth_of(words)


def test_sizes() -> None:
    assert [bytes_of(words) for words in ("64MiB", "10MB", "1.5kb", "7B")] == [64 << 20, 10**7, 1500, 7]
    for words in ("64", "64M", "x"):
        with pytest.raises(ValueError, match="no size"):
            bytes_of(words)


def test_numbers_are_shown_in_the_unit_that_suits_them() -> None:
    assert [show_seconds(s) for s in (3e-7, 0.0015, 1.0, 3600)] == ["0.3 µs", "1.5 ms", "1 s", "60 min"]
    assert [show_bytes(n) for n in (5, 2048, 300 << 20, 1.5 * 2**40)] == ["5 B", "2.00 KiB", "300 MiB", "1.50 TiB"]
    assert [show_bandwidth(r) for r in (1.25e9, 1e3, 1)] == ["10 Gbit/s", "8 kbit/s", "8 bit/s"]


# ---- metrics


def test_addresses() -> None:
    assert address_of(":9464") == address_of("9464") == ("127.0.0.1", 9464)
    assert address_of("0.0.0.0:1") == ("0.0.0.0", 1)
    assert address_of("[::1]:80") == ("::1", 80)
    for words in ("", ":", "host", "host:x", ":70000", ":-1"):
        with pytest.raises(ValueError, match="no address"):
            address_of(words)


def test_metrics_are_served_on_the_loopback() -> None:
    table = (mapping(0, 10, "[heap]"), mapping(10, 20, ""), mapping(30, 40, 'x"\n'))
    with Metrics() as metrics:
        for _ in range(2):
            runs = runs_of({1, 2, 9, 10, 11, 25, 35})
            metrics.observe(runs, table, pid=7, seconds=0.5, collect_seconds=0.001, cpu_seconds=0.25, page_bytes=PAGE)
        metrics.observe(runs_of(set()), table, pid=8, seconds=0.0)
        with urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        port = metrics.port
        with pytest.raises(KernelRefused, match="cannot be listened at"):
            Metrics(port=port)
    for line in (
        'dirtytrack_epochs_total{pid="7"} 2.0',
        'dirtytrack_dirty_pages_total{pid="7"} 14.0',
        f'dirtytrack_dirty_bytes_total{{pid="7"}} {14.0 * PAGE}',
        'dirtytrack_mapping_dirty_pages_total{mapping="[heap]",pid="7"} 6.0',
        'dirtytrack_mapping_dirty_pages_total{mapping="[anon]",pid="7"} 4.0',
        'dirtytrack_mapping_dirty_pages_total{mapping="x\\"\\n",pid="7"} 2.0',
        f'dirtytrack_dirty_bytes_per_second{{pid="7"}} {14.0 * PAGE}',
        'dirtytrack_observer_cpu_seconds{pid="7"} 0.25',
        'dirtytrack_dirty_bytes_per_second{pid="8"} 0.0',
    ):
        assert line in lines
    Metrics(port=port).close()  # it was let go


def test_many_names_become_one_series() -> None:
    table = tuple(mapping(i, i + 1, f"m{i}") for i in range(80))
    with Metrics() as metrics:
        metrics.observe(runs_of(set(range(80))), table, pid=7, seconds=0.5, page_bytes=PAGE)
        with urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    series = [line for line in lines if line.startswith("dirtytrack_mapping_dirty_pages_total{")]
    assert len(series) == 51
    assert 'dirtytrack_mapping_dirty_pages_total{mapping="[others]",pid="7"} 30.0' in series


def test_where_metrics_cannot_be_served() -> None:
    with pytest.raises(InvalidRecording, match="cannot be listened at"):
        Metrics("no.such.host.invalid", 0)
    assert issubclass(PermissionDenied, PermissionError)


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from dirtytrack.cli import main
from dirtytrack.errors import UnsupportedKernel
try:
    from dirtytrack.observe import Metrics
    Metrics()
except UnsupportedKernel as error:
    print(error.feature, error)
if sys.argv[2:]:
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("module", "package", "words", "status"),
    [
        ("numpy", "numpy", ["report", "x"], 1),
        ("numpy", "numpy", ["plan", "x", "--interval", "1s"], 1),
        ("prometheus_client", "prometheus-client", [], 0),
    ],
)
def test_without_the_extra(module: str, package: str, words: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, module, *words], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    says = f"package {package}, which is not installed: pip install dirtytrack[observe]"
    assert done.stdout.startswith(f"{package} ")
    assert says in done.stdout
    assert not words or says in " ".join(done.stderr.split())


def test_an_epoch_tells_what_it_is(tmp_path: Path) -> None:
    (epoch,) = epochs_of([frozenset({1})])
    assert repr(epoch) == "<Epoch 1: 1 pages, 0.000 to 0.100 s>"
    coarse = Epoch(EpochRecord(1, 3, 0, 10**9, 0, 0, Written.of(runs_of({1}), SHIFT).coarser(4)), PAGE, ())
    assert repr(coarse) == "<Epochs 1 to 3: 1 pages, in cells of 16, 0.000 to 1.000 s>"
    assert coarse.runs.tolist() == [[BASE // 16 * 16 * PAGE, (BASE // 16 * 16 + 16) * PAGE]]  # type: ignore[comparison-overlap]
    assert coarse.run_pages.tolist() == [1]
    with RecordingWriter(tmp_path / "r") as writer, pytest.raises(TypeError, match="pickled"):
        writer.__reduce__()
