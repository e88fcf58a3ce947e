# SPDX-License-Identifier: MIT
"""A heat map as one HTML page, which needs nothing but itself: page.html with the numbers put in."""

from __future__ import annotations

import base64
import html
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..process.mappings import named
from .arrays import np
from .colours import BACKGROUND, FOLD, INK, NOTHING, PALETTE

if TYPE_CHECKING:
    from .heat import HeatMap

__all__ = ["heat_page"]

_TEMPLATE = Path(__file__).with_name("page.html")


def heat_page(heat: HeatMap, *, title: str) -> str:
    """The page.

    It holds the counts of all cells as deflated bytes: first the lowest byte of each, then the next, up to the fourth,
    in the order of columns. Zoom and pan show as much detail as the map has.
    """
    counts = np.ascontiguousarray(heat.counts.astype("<u4"))
    planes = counts.view(np.uint8).reshape(-1, 4).T.tobytes()
    about: dict[str, Any] = {
        "title": title,
        "pageBytes": heat.page_bytes,
        "rowBytes": heat.row_bytes,
        "rows": heat.rows,
        "stretches": [list(stretch) for stretch in heat.stretches],
        "places": [[place.start, place.end, named(place.name)] for place in heat.places],
        "columns": [list(column) for column in heat.columns],
        "palette": PALETTE,
        "colours": {"background": BACKGROUND, "ink": INK, "fold": FOLD, "nothing": NOTHING},
        "counts": base64.b64encode(zlib.compress(planes, 9)).decode("ascii"),
    }
    # In a script element, only "</" could end it; JSON may have it escaped.
    embedded = json.dumps(about, separators=(",", ":")).replace("</", "<\\/")
    page = _TEMPLATE.read_text(encoding="utf-8")
    return page.replace("@@TITLE@@", html.escape(title)).replace("@@ABOUT@@", embedded)
