# SPDX-License-Identifier: MIT
"""Lisp programs answer as they should, whenever and however the heap that they live in is collected."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.heap import Heap, HeapExhausted, LispFailed
from examples.heap.lisp import PRIMITIVES, Lisp
from examples.heap.native import library
from tests.asked import SOAK
from tests.kernel.gc.programs import PROGRAMS, answer, expected

ROOT = Path(__file__).parents[3]
SIZES = {"gcbench": 11, "queens": 8, "derivative": 4, "table": 400}
STRESSED = {"gcbench": 4, "queens": 4, "derivative": 2, "table": 20}
SOAKED = {"gcbench": 6, "queens": 6, "derivative": 4, "table": 120}


def test_all_programs_are_tested() -> None:
    assert {path.stem for path in PROGRAMS.glob("*.lisp")} == set(SIZES) == set(STRESSED) == set(SOAKED)


@pytest.mark.parametrize("concurrent", [True, False], ids=["beside", "in pauses"])
@pytest.mark.parametrize("program", SIZES)
def test_a_program_answers_right(program: str, concurrent: bool) -> None:
    with Heap(eden_bytes=1 << 16, segment_bytes=256 << 10, concurrent=concurrent) as heap:
        assert answer(heap, program, SIZES[program]) == expected(program, SIZES[program])
        assert heap.numbers().minors > 10 or program == "derivative"
        heap.verify()


@pytest.mark.parametrize("promote_age", [0, 1, 3])
@pytest.mark.parametrize("program", STRESSED)
def test_a_collection_at_each_allocation(program: str, promote_age: int) -> None:
    size = STRESSED[program]
    options = {"eden_bytes": 16384, "segment_bytes": 512 << 10, "promote_age": promote_age, "old_bytes": 8 << 20}
    with Heap(stress=True, verify=True, **options) as heap:  # type: ignore[arg-type]
        assert answer(heap, program, size) == expected(program, size)
        assert heap.numbers().minors > 300
        assert heap.numbers().redirected_slots or promote_age == 3


@pytest.mark.soak
@pytest.mark.parametrize("program", SOAKED)
def test_a_collection_at_each_allocation_for_long(program: str) -> None:
    for promote_age in (0, 1, 2):
        with Heap(stress=True, verify=True, eden_bytes=65536, promote_age=promote_age) as heap:
            assert answer(heap, program, SOAKED[program]) == expected(program, SOAKED[program])


def test_programs_in_several_threads_of_one_heap() -> None:
    wanted = [(program, SIZES[program]) for program in SIZES for _ in range(2 if not SOAK else 20)]
    with Heap(eden_bytes=1 << 16, segment_bytes=256 << 10, verify=True) as heap:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda each: answer(heap, *each), wanted))
        assert answers == [expected(*each) for each in wanted]
        heap.full()
        numbers = heap.numbers()
        assert numbers.cycles + numbers.fulls > 1
        assert numbers.freed_bytes > 0


def test_programs_in_two_threads_with_a_collection_at_each_allocation() -> None:
    with Heap(eden_bytes=1 << 16, segment_bytes=256 << 10, stress=True, verify=True) as heap:
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda each: answer(heap, *each), [("queens", 4), ("derivative", 1)]))
        assert answers == [expected("queens", 4), expected("derivative", 1)]


# ---- the language ----------------------------------------------------------------------------------------------------


def test_the_evaluator_and_the_compiler_number_primitives_alike() -> None:
    names = {
        "set-car!": "SET_CAR",
        "set-cdr!": "SET_CDR",
        "null?": "IS_NULL",
        "eq?": "IS_EQ",
        "+": "ADD",
        "=": "NUMBER_EQ",
    }
    names |= {
        "make-vector": "MAKE_VECTOR",
        "vector-set!": "VECTOR_SET",
        "vector-length": "VECTOR_LENGTH",
        "cons": "CONS",
    }
    assert len(PRIMITIVES) == library().LISP_VECTOR_LENGTH + 1
    for name, constant in names.items():
        assert PRIMITIVES.index(name) == getattr(library(), f"LISP_{constant}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(let* ((a 1) (b (+ a 1))) (cons a b))", "(1 . 2)"),
        ("(let loop ((i 0)) (if (< i 100000) (loop (+ i 1)) i))", "100000"),
        ("(define (f) (define a 1) (define (g) (set! a (+ a 1)) a) (g) (g)) (f)", "3"),
        ("(letrec ((e (lambda (n) (or (= n 0) (o (- n 1))))) (o (lambda (n) (and (> n 0) (e (- n 1)))))) (e 9))", "#f"),
        ("(cond (#f 1) ((eq? 'a 'a) (cons 'b 'x)) (else 3))", "(b . x)"),
        ("(let ((v (make-vector 3 'a))) (vector-set! v 1 (- 5)) v)", "#(a -5 a)"),
        ("(or #f 7 (car '()))", "7"),
        ("(quotient -7 2)", "-3"),
        ("(lambda (x) x)", "#<function>"),
    ],
)  # fmt: skip
def test_what_the_language_has(text: str, value: str) -> None:
    with Heap(eden_bytes=16384, stress="100000" not in text, verify=True, segment_bytes=512 << 10) as heap:
        lisp = Lisp(heap)
        assert lisp.show(lisp.run(text)) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(car 1)", "not a pair"),
        ("(1 2)", "not a function"),
        ("((lambda (x) x))", "a function takes 1 arguments, not 0"),
        ("(vector-ref (make-vector 3 0) 3)", "index 3 of a vector of 3"),
        ("(+ 4611686018427387903 1)", "too large"),
        ("(quotient 1 0)", "division by zero"),
        ("unknown", "unbound: unknown"),
        ("(define (f n) (+ 1 (f n))) (f 1)", "10000 evaluations within each other"),
        ("(cons 1)", "2 arguments, not 1"),
        ("(let ((x)) x)", "no form of let"),
        ("(car '(1)", "not closed"),
    ],
)
def test_what_a_program_may_not_do(text: str, why: str) -> None:
    with Heap(eden_bytes=16384, segment_bytes=512 << 10) as heap:
        lisp = Lisp(heap)
        with pytest.raises(LispFailed, match=why):
            lisp.run(text)
        assert lisp.run("(+ 1 2)") == 3  # and the heap is as good as before
        heap.verify()


def test_a_program_that_needs_more_than_there_is() -> None:
    with Heap(eden_bytes=16384, old_bytes=1 << 20, segment_bytes=512 << 10, verify=True) as heap:
        lisp = Lisp(heap)
        with pytest.raises(HeapExhausted, match="all 1048576 bytes"):
            lisp.run("(let loop ((l '())) (loop (cons 1 l)))")
        heap.full()
        assert lisp.run("(let loop ((i 0)) (if (< i 20000) (begin (cons i i) (loop (+ i 1))) i))") == 20000


def test_the_command_runs_a_program() -> None:
    command = [sys.executable, "-W", "error", "-m", "examples.heap", "queens", "--size", "6", "--verify"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "4"
    assert "minor collections" in done.stdout
