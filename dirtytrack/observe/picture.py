# SPDX-License-Identifier: MIT
"""A heat map as a PNG picture, drawn by Pillow."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import UnsupportedKernel
from ..process.mappings import named
from .arrays import np
from .colours import BACKGROUND, FOLD, INK, LEVELS, NOTHING, PALETTE, levels
from .units import show_bytes

if TYPE_CHECKING:
    from .heat import HeatMap

__all__ = ["heat_png"]

_LEFT, _TOP, _RIGHT, _BOTTOM = 250, 44, 24, 56
_FOLD_PIXELS = 5
_LABEL_APART = 13
_MOST_ROW_PIXELS, _LEAST_PIXELS = 24, 3
_TICKS = 5


def heat_png(heat: HeatMap, path: str | os.PathLike[str], *, title: str, width: int = 1200, height: int = 800) -> None:
    """Draw it.

    Args:
        heat: what.
        path: where to; overwritten.
        title: what stands above it.
        width: of the picture, in pixels.
        height: at most; less where there are few rows.

    Raises:
        UnsupportedKernel: Pillow is not installed.
        OSError: the file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise UnsupportedKernel(
            "a PNG is drawn by the package pillow, which is not installed: pip install dirtytrack[observe]",
            feature="pillow",
        ) from error
    across, folds = width - _LEFT - _RIGHT, _FOLD_PIXELS * (len(heat.stretches) - 1)
    per_row = min(_MOST_ROW_PIXELS, max(1.0, (height - _TOP - _BOTTOM - folds) / heat.rows))
    colours = np.array([*PALETTE, NOTHING], np.uint8)[levels(heat.across(across))]  # -1 is the last
    strips = [max(_LEAST_PIXELS, round(per_row * stretch.rows)) for stretch in heat.stretches]
    picture = Image.new("RGB", (width, _TOP + sum(strips) + folds + _BOTTOM), BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    draw.text((_LEFT, 12), title, INK, ImageFont.load_default(16))
    y, free = _TOP, 0.0
    for stretch, tall in zip(heat.stretches, strips, strict=True):
        part = colours[:, stretch.first : stretch.first + stretch.rows].transpose(1, 0, 2)
        image = Image.fromarray(np.ascontiguousarray(part)).resize((across, tall), Image.Resampling.NEAREST)
        picture.paste(image, (_LEFT, y))
        for place in heat.names(stretch.start, stretch.end):
            at = y + (max(place.start, stretch.start) - stretch.start) / (stretch.rows * heat.row_bytes) * tall
            if at < free:
                continue
            free = at + _LABEL_APART
            name = named(place.name)
            address = f"{max(place.start, stretch.start):x} "
            while font.getlength(address + name) > _LEFT - 16:
                name = "…" + name.lstrip("…")[1:]
            draw.text((8, at - 2), address + name, INK, font)
            draw.line((_LEFT - 6, at, _LEFT - 1, at), INK)
        y += tall
        if stretch is not heat.stretches[-1]:
            draw.rectangle((_LEFT, y + 2, _LEFT + across - 1, y + 2), FOLD)
            y += _FOLD_PIXELS
    for i in range(_TICKS + 1):
        at, second = _LEFT + (across - 1) * i / _TICKS, heat.begun + (heat.ended - heat.begun) * i / _TICKS
        draw.line((at, y, at, y + 4), INK)
        draw.text((at, y + 7), f"{second:.1f} s", INK, font, anchor="mt")
    for level in range(1, LEVELS):  # what the colours mean
        draw.line((_LEFT + 2 * level, y + 34, _LEFT + 2 * level, y + 43), PALETTE[level], 2)
    words = f"a little … all of it written in each epoch; a row is {show_bytes(heat.row_bytes)}, gaps are folded"
    draw.text((_LEFT + 2 * LEVELS + 12, y + 32), words, INK, font)
    picture.save(path, "PNG", optimize=True)
