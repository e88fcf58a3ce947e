# SPDX-License-Identifier: MIT
"""How Sphinx builds these pages: `make docs`, into build/docs. Every reference must resolve, every warning is an error.

Nothing is fetched: names of the standard library are looked up in the interpreter instead of in an inventory.
"""

from __future__ import annotations

import inspect
import pydoc
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dirtytrack

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "dirtytrack"
author = "the dirtytrack maintainers"
project_copyright = "the dirtytrack maintainers, MIT licence"
version = release = dirtytrack.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_static"]
nitpicky = True
highlight_language = "none"
pygments_style, pygments_dark_style = "friendly", "native"
myst_enable_extensions = ["colon_fence", "deflist", "smartquotes"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"dirtytrack {version}"
html_static_path = ["_static"]
html_css_files = ["dirtytrack.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#c2541f", "color-brand-content": "#2563a8"},
    "dark_css_variables": {"color-brand-primary": "#e8743b", "color-brand-content": "#7db2ea"},
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True}
python_maximum_signature_line_length = 88

# ---- docstrings -----------------------------------------------------------------------------------------------------

_SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Warns")
_TITLES = {"Args": "Arguments"}
_REMARKS = ("Source: ", "Thread safety: ", "Warns: ")
_ENTRY = re.compile(r"([\w]+(?:, \w+)*)(?:: (.*)|\.)$", re.DOTALL)
_QUOTED = re.compile(r"(?<!`)`([^`]+)`(?![`_])(\w?)")
_NAME = re.compile(r"([A-Za-z_][\w.]*)(?:\(\))?$")


def _target(text: str, where: str) -> str | None:
    """What a quoted name means in the docstring of an object: a name of the front door, a member of its class, or a
    method of a session."""
    owner = ".".join(where.split(".")[:2])
    within = ("dirtytrack.Session", "dirtytrack.UffdSession", "dirtytrack.pagemap", "dirtytrack.process")
    for prefix in ("dirtytrack", owner, ".".join(where.split(".")[:3]), *within):
        name = f"{prefix}.{text}"
        if pydoc.locate(name) is not None:
            return name
    return text if pydoc.locate(text) is not None else None


def _links(text: str, where: str) -> str:
    """Names in single backticks become references, which must resolve; anything else there is code."""

    def link(match: re.Match[str]) -> str:
        quoted, after = match[1], f"\\ {match[2]}" if match[2] else ""
        name = _NAME.match(quoted)
        if not name:
            return f"``{quoted}``{after}"
        return f":py:obj:`{quoted} <{_target(name[1], where) or name[1]}>`{after}"

    return _QUOTED.sub(link, text)


def _entries(lines: list[str]) -> Iterator[str]:
    """The items of a section, each in one line; they end in a full stop."""
    text: list[str] = []
    for line in lines:
        if text and line[4] != " " and text[-1].endswith((".", ")")):
            yield " ".join(text)
            text = []
        text.append(line.strip())
    yield " ".join(text)


def _field(section: str, lines: list[str]) -> Iterator[str]:
    if section == "Returns":
        yield f":returns: {' '.join(line.strip() for line in lines)}"
        return
    yield from (f":{_TITLES.get(section, section)}:", "")
    for entry in _entries(lines):
        names = _ENTRY.match(entry)
        if names:
            quoted = "`{}`" if section in ("Raises", "Warns") else "``{}``"  # errors are links
            listed = ", ".join(quoted.format(name) for name in names[1].split(", "))
            yield f"    * {listed}" + (f": {names[2]}" if names[2] else "")
        else:
            yield f"    * {entry}"


def _process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sections become fields: several errors or arguments may share an entry, which no extension knows."""
    if lines and lines[0].startswith("Alias for field number"):  # what Python says of a field without a docstring
        lines.clear()
    done: list[str] = []
    waiting = lines[:]
    while waiting:
        line = waiting.pop(0)
        if line.endswith(":") and line[:-1] in _SECTIONS:
            section: list[str] = []
            while waiting and waiting[0].startswith("    "):
                section.append(waiting.pop(0))
            done += ["", *_field(line[:-1], section), ""]
        elif line.startswith(_REMARKS):
            label, _, text = line.partition(": ")
            while waiting and waiting[0].strip():
                text += " " + waiting.pop(0).strip()
            done += ["", f":{label}: {text}", ""]
        else:
            done.append(line)
    lines[:] = _links("\n".join(done), name).split("\n")


_MADE_BY_US = {
    "ProcessTracker",
    "Session",
    "Region",
    "Scan",
    "DirtySet",
    "Memory",
    "InFlight",
    "Statistics",
    "KernelSupport",
    "Check",
}
_MADE_BY_US |= {"PageCategory", "ScanFlag", "UffdFeature", "Delta", "ArrayChanges"}
_MADE_BY_US |= {
    "Epoch",
    "Observed",
    "RecorderStatistics",
    "DirtiedBuffer",
    "MappingShare",
    "Rate",
    "WorkingSet",
    "HotSet",
}
_MADE_BY_US |= {"HotRange", "Checkpoint", "Checkpoints", "Precopy", "Round"}


def _process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """How to make what only this library makes is left out, and so are private options."""
    if what == "exception" or (what == "class" and name.rpartition(".")[2] in _MADE_BY_US):
        return "" if signature else None, None
    return re.sub(r", _\w+: \w+ = \w+", "", signature or "") or None, returns


# ---- names that have no page of their own ---------------------------------------------------------------------------

_ALIASES = {"AnyBuffer", "Trackable", "Mirror", "Source"}  # for type checkers; api/index.md explains them
_UNPAGED = {"End", "NDArray", "np.int64", "np.float64", "dirtytrack.process.mappings.Mapping"}
_UNPAGED |= {"dirtytrack.gc.heap.Heap", "dirtytrack.kernel.words.Found"}
_UNPAGED |= {"Counts", "Shares", "np.uint64"}
_TYPING = {"Self", "Buffer", "typing_extensions.Self", "typing_extensions.Buffer"}


def _is_of_python(target: str) -> bool:
    """Whether the standard library has it."""
    if target in _TYPING:
        return True
    found = pydoc.locate(target)
    for module in ("typing", "collections.abc", "types"):
        found = found or getattr(sys.modules[module], target, None)
    home = getattr(found, "__module__", None) or getattr(inspect.getmodule(found), "__name__", "")
    return found is not None and str(home).split(".")[0] in sys.stdlib_module_names


def _missing_reference(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.Element | None:
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    if target in _ALIASES:  # not `dirtytrack.delta.Mirror`, which is called like one
        return contnode
    name = target.rpartition(".")[2]
    homes = {f"dirtytrack.{part}{name}" for part in ("", "delta.", "gc.", "observe.", "process.")}
    for known, *_ in env.domains["py"].get_objects():  # dirtytrack.tracker.DirtyTracker: documented at the front door
        if known in homes and target != known:
            return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", known, node, contnode)
    return contnode if target in _UNPAGED or _is_of_python(target) else None


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("missing-reference", _missing_reference)
