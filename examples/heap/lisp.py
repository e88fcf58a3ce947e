# SPDX-License-Identifier: MIT
"""A Lisp whose programs and data live in a heap: reader, compiler to trees for lisp.c, and printer.

Of Scheme it has quote, if, cond, and, or, let, let*, named let, letrec, lambda, define, set!, begin; numbers of 63
bits, pairs, symbols, vectors, closures and tail calls.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import LispFailed
from .heap import Heap
from .native import ffi, library
from .references import Ref, Value, value_of

__all__ = ["Lisp"]

Syntax = Any
"""What the reader makes: int, bool, Symbol, or a list of such; None is ()."""

(CONSTANT, LOCAL, GLOBAL, SET_LOCAL, SET_GLOBAL, IF, SEQUENCE, LAMBDA, CALL, PRIMITIVE) = range(10)
PAIR, SYMBOL, CLOSURE, NODE, FRAME, VECTOR = range(1, 7)
PRIMITIVES = (
    *("cons", "car", "cdr", "set-car!", "set-cdr!", "null?", "pair?", "symbol?", "number?", "eq?", "not"),
    *("+", "-", "*", "quotient", "remainder", "<", "=", "make-vector", "vector-ref", "vector-set!", "vector-length"),
)
TOKEN = re.compile(r"""\s+|;[^\n]*|([()']|[^\s()';]+)""")


class Symbol(str):
    """A name in a program."""

    __slots__ = ()


class Scope:
    """The names that a function's frame has, from its slot 1 on."""

    def __init__(self, names: list[Symbol], outer: Scope | None) -> None:
        self.names, self.outer = names, outer

    def find(self, name: str) -> tuple[int, int] | None:
        """How many frames up, and which slot."""
        scope: Scope | None = self
        up = 0
        while scope is not None:
            if name in scope.names:
                return up, 1 + scope.names.index(Symbol(name))
            scope, up = scope.outer, up + 1
        return None


class Lisp:
    """Programs in one heap, which share their global names.

    Thread safety: several threads may evaluate at once, and do so in parallel. Global names are shared.
    """

    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self._symbols: dict[str, Ref] = {}
        self._lock = threading.RLock()

    # ---- running

    def run(self, text: str) -> Value:
        """Evaluate each expression of a text; the value of the last one.

        Raises:
            LispFailed: it is no program, or does what it may not.
            HeapExhausted, HeapCorrupt: of the heap.
        """
        value: Value = None
        for expression in self.read(text):
            value = self.evaluate(self.compile(expression))
        return value

    def run_file(self, path: Path, **globals: int) -> Value:
        """`run` what a file has, with these numbers as global names."""
        for name, value in globals.items():
            self.run(f"(define {name} {value})")
        return self.run(path.read_text(encoding="utf-8"))

    def evaluate(self, node: Ref) -> Value:
        """The value of what `compile` made."""
        heap = self.heap
        thread, message = heap._thread(), ffi.new("char[128]")
        outcome = library().lisp_evaluate(thread.native, node.handle, thread.spare, thread.word, message)
        if outcome == library().LISP_FAILED:
            raise LispFailed(bytes(ffi.buffer(message)).split(b"\0")[0].decode(errors="replace"))
        heap._check(outcome)
        value = value_of(thread.word[0])
        return heap._ref(thread) if value is Ref else value  # type: ignore[return-value]

    # ---- reading

    def read(self, text: str) -> Iterator[Syntax]:
        """The expressions of a text."""
        tokens = [match[1] for match in TOKEN.finditer(text) if match[1]]
        at = 0
        while at < len(tokens):
            expression, at = self._read(tokens, at)
            yield expression

    def _read(self, tokens: list[str], at: int) -> tuple[Syntax, int]:
        if at == len(tokens):
            raise LispFailed("the text ends within an expression")
        token, at = tokens[at], at + 1
        if token == "(":
            items: list[Syntax] = []
            while at < len(tokens) and tokens[at] != ")":
                item, at = self._read(tokens, at)
                items.append(item)
            if at == len(tokens):
                raise LispFailed("a parenthesis is not closed")
            return items or None, at + 1
        if token == ")":
            raise LispFailed("a parenthesis is closed that was not opened")
        if token == "'":
            quoted, at = self._read(tokens, at)
            return [Symbol("quote"), quoted], at
        if token in ("#t", "#f"):
            return token == "#t", at
        return (int(token) if re.fullmatch(r"[-+]?\d+", token) else Symbol(token)), at

    # ---- compiling

    def compile(self, expression: Syntax) -> Ref:
        """An expression as a tree in the heap."""
        return self._compile(expression, None)

    def symbol(self, name: str) -> Ref:
        """The one of that name: its name, its value, whether it has one."""
        with self._lock:
            if name not in self._symbols:
                self._symbols[name] = self.heap.tuple(self.heap.string(name), None, None, tag=SYMBOL)
            return self._symbols[name]

    def datum(self, quoted: Syntax) -> Value:
        """What was quoted, as data."""
        if isinstance(quoted, Symbol):
            return self.symbol(quoted)
        if not isinstance(quoted, list):
            return quoted  # type: ignore[no-any-return]
        made: Value = None
        for item in reversed(quoted):
            made = self.heap.tuple(self.datum(item), made, tag=PAIR)
        return made

    def _node(self, *parts: Value) -> Ref:
        return self.heap.tuple(*parts, tag=NODE)

    def _compile(self, x: Syntax, scope: Scope | None) -> Ref:
        if isinstance(x, Symbol):
            found = scope.find(x) if scope is not None else None
            return self._node(LOCAL, *found) if found else self._node(GLOBAL, self.symbol(x))
        if not isinstance(x, list):
            return self._node(CONSTANT, x)
        special = getattr(self, f"_{FORMS[x[0]]}", None) if isinstance(x[0], Symbol) and x[0] in FORMS else None
        if special is not None and (scope is None or scope.find(x[0]) is None):
            try:
                made: Ref = special(x, scope)
            except (IndexError, ValueError, TypeError) as error:
                raise LispFailed(f"no form of {x[0]}: {_shown(x)} ({error})") from error
            return made
        arguments = [self._compile(each, scope) for each in x[1:]]
        if x[0] in PRIMITIVES and (scope is None or scope.find(x[0]) is None):
            return self._primitive(str(x[0]), arguments)
        return self._node(CALL, self._compile(x[0], scope), *arguments)

    def _primitive(self, name: str, arguments: list[Ref]) -> Ref:
        number = PRIMITIVES.index(name)
        if name in ("+", "*", "-") and len(arguments) != 2:
            if not arguments or (name == "-" and len(arguments) == 1):
                arguments = [self._node(CONSTANT, 1 if name == "*" else 0), *arguments]
            made = arguments[0]
            for each in arguments[1:]:
                made = self._node(PRIMITIVE, number, made, each)
            return made
        return self._node(PRIMITIVE, number, *arguments)

    def _quote(self, x: Syntax, scope: Scope | None) -> Ref:
        (quoted,) = x[1:]
        return self._node(CONSTANT, self.datum(quoted))

    def _if(self, x: Syntax, scope: Scope | None) -> Ref:
        condition, then, *otherwise = x[1:]
        (last,) = otherwise or [None]
        return self._node(IF, *(self._compile(each, scope) for each in (condition, then, last)))

    def _cond(self, x: Syntax, scope: Scope | None) -> Ref:
        made: Syntax = None
        for condition, *body in reversed(x[1:]):
            if condition == "else":
                made = [Symbol("begin"), *body]
            else:
                made = [Symbol("if"), condition, [Symbol("begin"), *body], made]
        return self._compile(made, scope)

    def _and(self, x: Syntax, scope: Scope | None) -> Ref:
        made: Syntax = x[-1] if len(x) > 1 else True
        for each in reversed(x[1:-1]):
            made = [Symbol("if"), each, made, False]
        return self._compile(made, scope)

    def _or(self, x: Syntax, scope: Scope | None) -> Ref:
        made: Syntax = x[-1] if len(x) > 1 else False
        for each in reversed(x[1:-1]):
            hidden = Symbol(" value")  # no program can say this name
            later = [Symbol("lambda"), None, made]
            made = [Symbol("let"), [[hidden, each]], [Symbol("if"), hidden, hidden, [later]]]
        return self._compile(made, scope)

    def _begin(self, x: Syntax, scope: Scope | None) -> Ref:
        if len(x) == 2:
            return self._compile(x[1], scope)
        return self._node(SEQUENCE, *(self._compile(each, scope) for each in x[1:] or [None]))

    def _lambda(self, x: Syntax, scope: Scope | None) -> Ref:
        parameters, body = list(x[1] or []), x[2:]
        if not body or not all(isinstance(each, Symbol) for each in parameters):
            raise LispFailed(f"no function: {_shown(x)}")
        own = [_defined(each) for each in body if isinstance(each, list) and each[0] == "define"]
        own = [name for name in dict.fromkeys(own) if name not in parameters]
        inner = Scope([*parameters, *own], scope)
        return self._node(LAMBDA, len(parameters), self._begin([None, *body], inner), len(own))

    def _let(self, x: Syntax, scope: Scope | None) -> Ref:
        if isinstance(x[1], Symbol):  # a named let
            names, values = _bindings(x[2])
            function = [Symbol("lambda"), names, *x[3:]]
            return self._compile([[Symbol("letrec"), [[x[1], function]], x[1]], *values], scope)
        names, values = _bindings(x[1])
        return self._compile([[Symbol("lambda"), names, *x[2:]], *values], scope)

    def _let_in_order(self, x: Syntax, scope: Scope | None) -> Ref:
        made: Syntax = [Symbol("let"), None, *x[2:]]
        for binding in reversed(x[1] or []):
            made = [Symbol("let"), [binding], made]
        return self._compile(made, scope)

    def _letrec(self, x: Syntax, scope: Scope | None) -> Ref:
        defines = [[Symbol("define"), name, value] for name, value in x[1]]
        return self._compile([[Symbol("lambda"), None, *defines, *x[2:]]], scope)

    def _define(self, x: Syntax, scope: Scope | None) -> Ref:
        value = [Symbol("lambda"), x[1][1:], *x[2:]] if isinstance(x[1], list) else x[2]
        return self._assign(_defined(x), value, scope)

    def _set(self, x: Syntax, scope: Scope | None) -> Ref:
        name, value = x[1:]
        return self._assign(name, value, scope)

    def _assign(self, name: Symbol, value: Syntax, scope: Scope | None) -> Ref:
        found = scope.find(name) if scope is not None else None
        node = self._compile(value, scope)
        return self._node(SET_LOCAL, *found, node) if found else self._node(SET_GLOBAL, self.symbol(name), node)

    def _greater(self, x: Syntax, scope: Scope | None) -> Ref:
        one, other = x[1:]
        return self._compile([Symbol("<"), other, one], scope)

    def _at_most(self, x: Syntax, scope: Scope | None) -> Ref:
        one, other = x[1:]
        return self._compile([Symbol("not"), [Symbol("<"), other, one]], scope)

    def _at_least(self, x: Syntax, scope: Scope | None) -> Ref:
        one, other = x[1:]
        return self._compile([Symbol("not"), [Symbol("<"), one, other]], scope)

    # ---- printing

    def show(self, value: Value) -> str:
        """As a program would write it."""
        if not isinstance(value, Ref):
            return _shown(value)
        if value.tag == SYMBOL and value.kind == "tuple":
            name = value[0]
            assert isinstance(name, Ref)
            return name.text
        if value.tag == VECTOR:
            return f"#({' '.join(self.show(each) for each in value)})"
        if value.tag != PAIR:
            return "#<function>" if value.tag == CLOSURE else repr(value)
        shown = list[str]()
        rest: Value = value
        while isinstance(rest, Ref) and rest.tag == PAIR:
            shown.append(self.show(rest[0]))
            rest = rest[1]
        return f"({' '.join(shown)}{'' if rest is None else f' . {self.show(rest)}'})"


FORMS = {
    **{name: name for name in ("quote", "if", "cond", "and", "or", "begin", "lambda", "let", "letrec", "define")},
    "let*": "let_in_order",
    "set!": "set",
    ">": "greater",
    "<=": "at_most",
    ">=": "at_least",
}


def _defined(x: Syntax) -> Symbol:
    name = x[1][0] if isinstance(x[1], list) else x[1]
    if not isinstance(name, Symbol):
        raise LispFailed(f"no name to define: {_shown(x)}")
    return name


def _bindings(x: Syntax) -> tuple[list[Symbol] | None, list[Syntax]]:
    pairs = [(name, value) for name, value in x or []]
    return [name for name, _ in pairs] or None, [value for _, value in pairs]


def _shown(x: Syntax) -> str:
    if isinstance(x, list):
        return f"({' '.join(_shown(each) for each in x)})"
    if x is None or isinstance(x, bool):  # not by comparing: True is 1
        return "()" if x is None else "#t" if x else "#f"
    return str(x)
