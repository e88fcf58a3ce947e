/* SPDX-License-Identifier: MIT
 * A look that changes nothing: what a collect would find now, by the same questions. */
#include "engine.h"

typedef struct peek_context { dt_set *out; int rc; dt_session *s; } peek_context;

static void add_run(void *context, uint64_t start, uint64_t end)
{
    peek_context *c = context;
    if (!c->rc)
        c->rc = dt_set_reserve(c->out, c->out->count + 1);
    if (!c->rc)
        dt_set_append(c->out, start, end);
}

/* In no order. */
static void push_run(void *context, uint64_t start, uint64_t end)
{
    peek_context *c = context;
    if (!c->rc)
        c->rc = dt_set_reserve(c->out, c->out->count + 1);
    if (!c->rc)
        c->out->runs[c->out->count++] = (dt_run){start, end};
}

/* Whoever peeks will read the page, and then it is there again: so it is pending from now on. */
static void push_lost(void *context, uint64_t start, uint64_t end, bool keep)
{
    const peek_context *c = context;
    (void)keep;
    push_run(context, start, end);
    dt_mark_all(c->s->watches, c->s->watch_count, start, end);
    dt_alias_tell(c->s, start, end);
}

typedef struct push_moved { peek_context *to; uint64_t distance; } push_moved;

static void push_elsewhere(void *context, uint64_t start, uint64_t end)
{
    const push_moved *m = context;
    push_run(m->to, start - m->distance, end - m->distance);
}

int dt_peek_range(dt_session *s, uint64_t start, uint64_t end, bool present, dt_watch *const *watches, uint64_t watch_count,
                  dt_set *written, dt_set *others, dt_failure *why)
{
    peek_context c = {written, 0, s}, o = {others, 0, s};
    uint64_t kept = written->count;
    dt_pass beneath = {.session = s, .watches = watches, .watch_count = watch_count, .present = present};
    dt_look_beneath(&beneath, start, end);
    dt_question question = present ? DT_ARM_POPULATED : DT_ARM_WRITTEN;
    question.flags = K_PM_SCAN_CHECK_WPASYNC;
    int rc = dt_query(s, start, end, &question, add_run, &c);
    if (rc == -EPERM && !c.rc) { /* some of it is not ours any more: a collect would renew it, wholly dirty */
        written->count = kept;
        add_run(&c, start, end);
        rc = 0;
    }
    if (!rc && beneath.find_absent) /* remedy R1, as in a collect */
        rc = dt_query(s, start, end, &DT_ABSENT, push_run, &o);
    for (uint64_t i = 0; !rc && beneath.find_lost && i < watch_count; i++) /* and R2 */
        if (!watches[i]->listener && watches[i]->region->armed)
            rc = dt_find_lost(s, watches[i], start, end, false, push_lost, &o);
    uint64_t next = 0;
    dt_run elsewhere;
    while (!rc && beneath.aliased && dt_alias_next(s, start, end, &next, &elsewhere)) {
        push_moved m = {&o, elsewhere.start - dt_alias_origin(s, next - 1, start)};
        question.flags = 0; /* what is not ours there any more is all written: extra, and the next collect finds out */
        rc = dt_query(s, elsewhere.start, elsewhere.end, &question, push_elsewhere, &m);
    }
    dt_set_sort(others);
    int memory = c.rc ? c.rc : o.rc;
    if (memory)
        return dt_fail_with(why, memory, -memory, DT_STEP_MEMORY, start, end);
    return rc ? dt_fail_with(why, rc, -rc, DT_STEP_SCAN, start, end) : 0;
}
