# SPDX-License-Identifier: MIT
"""The kernel's numbers: right where this machine's headers know them, and unknown bits are kept."""

from __future__ import annotations

import re
from enum import IntFlag
from pathlib import Path

import pytest

from dirtytrack.kernel.abi import PageCategory, ScanFlag, UffdFeature

CSRC = Path(__file__).parents[2] / "dirtytrack" / "kernel" / "csrc"
PREFIXES: dict[type[IntFlag], tuple[str, str]] = {
    PageCategory: ("PAGE_IS_", "linux/fs.h"),
    ScanFlag: ("PM_SCAN_", "linux/fs.h"),
    UffdFeature: ("UFFD_FEATURE_", "linux/userfaultfd.h"),
}


def defined(text: str, prefix: str) -> dict[str, int]:
    found = re.findall(rf"^#define\s+{prefix}(\w+)\s+\(\(?(?:__u64\)?)?\s*\(?1u?\s*<<\s*(\d+)\)", text, re.MULTILINE)
    return {name: 1 << int(bit) for name, bit in found}


@pytest.mark.parametrize("flags", PREFIXES)
def test_agrees_with_the_core(flags: type[IntFlag]) -> None:
    numbers = defined((CSRC / "abi.h").read_text(), "K_" + PREFIXES[flags][0])
    assert numbers
    assert numbers == {name: flags[name].value for name in numbers}


@pytest.mark.parametrize("flags", PREFIXES)
def test_agrees_with_the_system_headers(flags: type[IntFlag]) -> None:
    prefix, header = PREFIXES[flags]
    path = Path("/usr/include", header)
    numbers = defined(path.read_text(), prefix) if path.exists() else {}
    assert {name: flags[name].value for name in numbers if name in flags.__members__} == {
        name: value for name, value in numbers.items() if name in flags.__members__
    }


@pytest.mark.parametrize("flags", PREFIXES)
def test_unknown_bits_are_kept(flags: type[IntFlag]) -> None:
    everything = flags((1 << 64) - 1)
    assert int(everything) == (1 << 64) - 1
    one = flags(1 << 63)
    assert int(one) == 1 << 63
    assert int(one | next(iter(flags))) == (1 << 63) + next(iter(flags)).value
    assert one in everything
