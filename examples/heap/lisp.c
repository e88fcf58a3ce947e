/* SPDX-License-Identifier: MIT
 * An evaluator whose programs, frames and data are objects of the heap. lisp.py makes the programs.
 *
 * One rule keeps it right: what is needed after something that may collect, which is whatever evaluates or allocates,
 * lies on the mutator's stack, where a collection finds and updates it. C variables are read from there again. */
#include "internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#define MESSAGE_BYTES 128
#define DEEPEST 10000 /* evaluations within evaluations: the C stack holds some more */

typedef struct lisp {
    heap_mutator *mutator;
    char *message;
    uint32_t depth;
    jmp_buf failed; /* to lisp_evaluate, by the outcome */
} lisp;

__attribute__((noreturn, format(printf, 2, 3))) static void fail(lisp *lisp, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(lisp->message, MESSAGE_BYTES, format, arguments);
    va_end(arguments);
    longjmp(lisp->failed, LISP_FAILED);
}

static void hold(lisp *lisp, heap_word word)
{
    heap_mutator *mutator = lisp->mutator;
    if (mutator->top == mutator->stack + STACK_WORDS)
        fail(lisp, "the stack is full");
    *mutator->top++ = word;
}

static heap_word make(lisp *lisp, enum lisp_tag tag, uint64_t length)
{
    heap_word made = allocate(lisp->mutator, HEAP_TUPLE, tag, length);
    if (!made)
        longjmp(lisp->failed, HEAP_REFUSED);
    return made;
}

static heap_word item(heap_word tuple, uint64_t index) { return load(slot(tuple, index)); }
static uint64_t length(heap_word object) { return length_of(header_of(object)); }
static heap_word truth(bool value) { return value ? TRUE : FALSE; }

static bool has_tag(heap_word word, enum lisp_tag tag)
{
    return is_object(word) && kind_of(header_of(word)) == HEAP_TUPLE && tag_of(header_of(word)) == tag;
}

static heap_word require(lisp *lisp, heap_word word, enum lisp_tag tag, const char *what)
{
    if (!has_tag(word, tag))
        fail(lisp, "not a %s: %#llx", what, (unsigned long long)word);
    return word;
}

static int64_t require_number(lisp *lisp, heap_word word)
{
    if (!is_number(word))
        fail(lisp, "not a number: %#llx", (unsigned long long)word);
    return value_of(word);
}

static heap_word result_of(lisp *lisp, bool overflow, int64_t value)
{
    if (overflow || value_of(number(value)) != value)
        fail(lisp, "a number is too large: it has 63 bits");
    return number(value);
}

static heap_word *element(lisp *lisp, heap_word vector, heap_word index)
{
    int64_t at = require_number(lisp, index);
    uint64_t count = length(require(lisp, vector, LISP_VECTOR, "vector"));
    if (at < 0 || (uint64_t)at >= count)
        fail(lisp, "index %lld of a vector of %llu", (long long)at, (unsigned long long)count);
    return slot(vector, (uint64_t)at);
}

/* Of two numbers. */
static heap_word compute(lisp *lisp, enum lisp_primitive operation, int64_t a, int64_t b)
{
    int64_t value = 0;
    bool overflow = false;
    switch (operation) {
    case LISP_ADD:
        overflow = __builtin_add_overflow(a, b, &value);
        break;
    case LISP_SUBTRACT:
        overflow = __builtin_sub_overflow(a, b, &value);
        break;
    case LISP_MULTIPLY:
        overflow = __builtin_mul_overflow(a, b, &value);
        break;
    default:
        if (!b)
            fail(lisp, "division by zero");
        value = operation == LISP_QUOTIENT ? a / b : a % b; /* 63 bits: no overflow */
    }
    return result_of(lisp, overflow, value);
}

/* The arguments are on the stack, and stay there. */
static heap_word primitive(lisp *lisp, enum lisp_primitive operation, heap_word *at, uint64_t count)
{
    heap_word made, *place;
    static const uint8_t WANTED[] = {2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 1};
    if (count != WANTED[operation])
        fail(lisp, "a primitive takes %d arguments, not %d", WANTED[operation], (int)count);
    switch (operation) {
    case LISP_CONS:
        made = make(lisp, LISP_PAIR, 2);
        store(slot(made, 0), at[0]);
        store(slot(made, 1), at[1]);
        return made;
    case LISP_CAR:
    case LISP_CDR:
        return item(require(lisp, at[0], LISP_PAIR, "pair"), operation == LISP_CDR);
    case LISP_SET_CAR:
    case LISP_SET_CDR:
        store(slot(require(lisp, at[0], LISP_PAIR, "pair"), operation == LISP_SET_CDR), at[1]);
        return NIL;
    case LISP_IS_NULL:
        return truth(at[0] == NIL);
    case LISP_IS_PAIR:
        return truth(has_tag(at[0], LISP_PAIR));
    case LISP_IS_SYMBOL:
        return truth(has_tag(at[0], LISP_SYMBOL));
    case LISP_IS_NUMBER:
        return truth(is_number(at[0]));
    case LISP_IS_EQ:
        return truth(at[0] == at[1]);
    case LISP_NOT:
        return truth(at[0] == FALSE);
    case LISP_LESS:
        return truth(require_number(lisp, at[0]) < require_number(lisp, at[1]));
    case LISP_NUMBER_EQ:
        return truth(require_number(lisp, at[0]) == require_number(lisp, at[1]));
    case LISP_MAKE_VECTOR:
        if (require_number(lisp, at[0]) < 0 || value_of(at[0]) > UINT32_MAX)
            fail(lisp, "no vector has %lld elements", (long long)value_of(at[0]));
        made = make(lisp, LISP_VECTOR, (uint64_t)value_of(at[0]));
        for (uint64_t i = 0; i < length(made); i++)
            store(slot(made, i), at[1]);
        return made;
    case LISP_VECTOR_REF:
        return load(element(lisp, at[0], at[1]));
    case LISP_VECTOR_SET:
        place = element(lisp, at[0], at[1]);
        store(place, at[2]);
        return NIL;
    case LISP_VECTOR_LENGTH:
        return number((int64_t)length(require(lisp, at[0], LISP_VECTOR, "vector")));
    default:
        return compute(lisp, operation, require_number(lisp, at[0]), require_number(lisp, at[1]));
    }
}

static heap_word *local(heap_word frame, heap_word node)
{
    for (int64_t up = value_of(item(node, 1)); up > 0; up--)
        frame = item(frame, 0);
    return slot(frame, (uint64_t)value_of(item(node, 2)));
}

/* Begins a call: at[0] is the closure, the arguments follow. Returns the new frame. */
static heap_word frame_for(lisp *lisp, heap_word *at, uint64_t count)
{
    heap_word lambda = item(require(lisp, at[0], LISP_CLOSURE, "function"), 0);
    uint64_t wanted = (uint64_t)value_of(item(lambda, 1));
    if (count != wanted)
        fail(lisp, "a function takes %llu arguments, not %llu", (unsigned long long)wanted, (unsigned long long)count);
    heap_word frame = make(lisp, LISP_FRAME, 1 + wanted + (uint64_t)value_of(item(lambda, 3)));
    store(slot(frame, 0), item(at[0], 1));
    for (uint64_t i = 0; i < count; i++)
        store(slot(frame, 1 + i), at[1 + i]);
    return frame;
}

static heap_word evaluate(lisp *lisp, heap_word node, heap_word frame)
{
    heap_mutator *mutator = lisp->mutator;
    heap_word *base = mutator->top, result = NIL; /* base[0] is the node and base[1] the frame, from here on */
    hold(lisp, node);
    hold(lisp, frame);
    if (++lisp->depth > DEEPEST)
        fail(lisp, "%d evaluations within each other", DEEPEST);
    for (bool more = true; more;) {
        enum lisp_operation operation = (enum lisp_operation)value_of(item(base[0], 0));
        uint64_t count = length(base[0]);
        switch (operation) {
        case LISP_CONSTANT:
            result = item(base[0], 1);
            more = false;
            break;
        case LISP_LOCAL:
            result = load(local(base[1], base[0]));
            more = false;
            break;
        case LISP_GLOBAL: /* a symbol: name, value, whether it has one */
            result = item(item(base[0], 1), 1);
            if (item(item(base[0], 1), 2) != TRUE)
                fail(lisp, "unbound: %.*s", (int)length(item(item(base[0], 1), 0)),
                     (const char *)slot(item(item(base[0], 1), 0), 0));
            more = false;
            break;
        case LISP_SET_LOCAL:
            result = evaluate(lisp, item(base[0], 3), base[1]);
            store(local(base[1], base[0]), result);
            more = false;
            break;
        case LISP_SET_GLOBAL:
            result = evaluate(lisp, item(base[0], 2), base[1]);
            store(slot(item(base[0], 1), 1), result);
            store(slot(item(base[0], 1), 2), TRUE);
            more = false;
            break;
        case LISP_IF:
            result = evaluate(lisp, item(base[0], 1), base[1]);
            base[0] = item(base[0], result == FALSE ? 3 : 2);
            break;
        case LISP_SEQUENCE:
            for (uint64_t i = 1; i < count - 1; i++)
                evaluate(lisp, item(base[0], i), base[1]);
            base[0] = item(base[0], count - 1);
            break;
        case LISP_LAMBDA:
            result = make(lisp, LISP_CLOSURE, 2);
            store(slot(result, 0), base[0]);
            store(slot(result, 1), base[1]);
            more = false;
            break;
        case LISP_CALL:
            for (uint64_t i = 1; i < count; i++)
                hold(lisp, evaluate(lisp, item(base[0], i), base[1]));
            base[1] = frame_for(lisp, base + 2, count - 2);
            base[0] = item(item(base[2], 0), 2);
            mutator->top = base + 2; /* a tail call: this evaluation goes on as that of the function's body */
            heap_safepoint(mutator);
            break;
        case LISP_PRIMITIVE:
            for (uint64_t i = 2; i < count; i++)
                hold(lisp, evaluate(lisp, item(base[0], i), base[1]));
            result = primitive(lisp, (enum lisp_primitive)value_of(item(base[0], 1)), base + 2, count - 2);
            more = false;
            break;
        default:
            fail(lisp, "no operation: %d", (int)operation);
        }
    }
    mutator->top = base;
    lisp->depth--;
    return result;
}

int lisp_evaluate(heap_mutator *mutator, uint32_t node, uint32_t out, heap_word *word, char *message)
{
    lisp lisp = {.mutator = mutator, .message = message};
    heap *heap = mutator->heap;
    heap_word *top = mutator->top;
    int outcome = heap_enter(mutator);
    if (outcome)
        return outcome;
    outcome = setjmp(lisp.failed);
    if (!outcome) {
        *word = evaluate(&lisp, load(heap->handles + node), NIL);
        keep(heap, out, is_object(*word) ? *word : NIL);
    }
    mutator->top = top;
    heap_leave(mutator);
    return outcome;
}
