/* SPDX-License-Identifier: MIT
 * Adaptive re-arming: blocks of pages that are rewritten densely, epoch after epoch, are left unarmed for a while.
 *
 * An armed page costs its writer a fault, which is twenty times what finding it costs us. A block that is left unarmed is
 * assumed: each collecting pass over it tells all of its pages to everybody. That makes it safe whatever is decided here:
 * a block is either told whole, or scanned, and the kernel calls each page written that is not armed.
 *
 * Whether a block is still hot is asked of a sample: a few of its pages are armed in one pass and counted in the next.
 * Blocks take turns, so that each pass asks some of them, and what they say together tells a change of phase at once. */
#include "engine.h"
#include <sys/mman.h>

#define SAMPLE_PAGES 8u
#define MOST_SAMPLES 4u     /* in a row, while they say that a block has cooled */
#define LEAST_PASSES 2u     /* before a block is assumed for the first time */
#define FIRST_INTERVAL 16u  /* passes from one sample of a block to the next; it doubles while the block stays hot */
#define LAST_INTERVAL 64u   /* and so bounds for how long a cold block may be told whole */
#define NEIGHBOURS 16u      /* blocks at either side that are asked next where one has cooled */
#define LEAST_VOTES 4u      /* samples of one pass that must have cooled, and be the most, to arm all blocks again */
#define LEAST_DENSE 4u      /* pages: below that, what things cost need not be known */
#define LEAST_BLOCKS 8u     /* below 2 MiB there is little to win */

enum { EXACT, ASSUMED, SAMPLED };

typedef struct heat {
    uint16_t interval;      /* the last one; 0: it was not assumed since it last was cold */
    uint8_t found;          /* pages that the pass under way found */
    uint8_t passes;         /* exact ones since `excess` was 0 */
    uint16_t excess;        /* pages found in them beyond the threshold */
    uint8_t state;
    uint8_t sample;         /* the first page of its sample */
    uint8_t wait;           /* passes until it is sampled */
    uint8_t samples;        /* in a row, of one question */
    uint8_t written;        /* pages of these that were written */
} heat;

struct dt_adapt {
    uint64_t block_bytes, block_pages;
    bool eager;             /* DT_REMEDY_EAGER */
    uint64_t start, end;    /* the whole blocks of the region, which begin at multiples of a block */
    uint64_t not_exact;     /* blocks */
    uint64_t threshold;     /* pages found in a pass: from so many on, a block is cheaper unarmed; 0: not known yet */
    uint64_t hot, cool;     /* what the samples of the pass under way said */
    uint64_t found, assumed; /* pages, in the pass under way */
    uint64_t predicted_ns;  /* what the pass under way was to cost */
    uint64_t sampled, written; /* pages of all samples, and those that were written: how dense assumed blocks are */
    bool alive;             /* something was found since the last decision, or some block is not exact or was dense */
    heat blocks[];
};

/* ---- what things cost here ------------------------------------------------------------------------------------------ */

static struct { uint64_t fault, arm, copy, copy_apart; } cost; /* ns a page; fault stays 0 where it cannot be measured */
static _Atomic int measuring; /* 0: not yet, 1: somebody does, 2: done, as far as it went */

#define FAULTS 128u
#define APART 16u           /* pages from one that is written to the next */
#define COPIES 256u
#define TRIES 3

/* What a program wrote in an epoch is in no cache of ours when it is copied. */
static void push_out(const uint8_t *memory, uint64_t bytes)
{
#ifdef __x86_64__
    for (uint64_t i = 0; i < bytes; i += 64)
        __builtin_ia32_clflush(memory + i);
#else
    (void)memory, (void)bytes;
#endif
}

static uint64_t a_page_since(uint64_t begun, uint64_t pages) { return dt_max((dt_now_ns() - begun) / pages, 1); }

/* Pages of our own: those to be written lie apart, behind a piece without gaps. */
static void measure(dt_session *s, uint8_t *memory, uint64_t step)
{
    uint64_t page = dt_page_bytes();
    uint8_t *apart = memory + 2 * COPIES * page;
    uint64_t start = (uintptr_t)apart, end = start + FAULTS * step;
    uint64_t fault = UINT64_MAX, arm = UINT64_MAX, copy = UINT64_MAX, copy_apart = UINT64_MAX;
    int rc = dt_uffd_register(s, start, end);
    for (int i = 0; !rc && i <= TRIES; i++) {
        uint64_t begun = dt_now_ns(), found;
        for (uint64_t k = 0; k < FAULTS; k++)
            *(volatile uint8_t *)(apart + k * step) = 1;
        if (i) /* armed by then */
            fault = dt_min(fault, a_page_since(begun, FAULTS));
        begun = dt_now_ns();
        rc = dt_scan_apart(s, start, end, true, &found);
        arm = dt_min(arm, a_page_since(begun, FAULTS));
        push_out(memory, 2 * COPIES * page);
        begun = dt_now_ns();
        memcpy(memory + COPIES * page, memory, COPIES * page);
        if (i) /* populated by then */
            copy = dt_min(copy, a_page_since(begun, COPIES));
        push_out(memory + COPIES * page, COPIES * page);
        for (uint64_t k = 0; k < FAULTS; k++)
            push_out(apart + k * step, page);
        begun = dt_now_ns();
        for (uint64_t k = 0; k < FAULTS; k++)
            memcpy(memory + (COPIES + k * (COPIES / FAULTS)) * page, apart + k * step, page);
        copy_apart = dt_min(copy_apart, a_page_since(begun, FAULTS));
    }
    dt_uffd_unregister(s, start, end);
    cost.arm = arm;
    cost.copy = copy;
    cost.copy_apart = dt_max(copy_apart, copy);
    if (!rc)
        cost.fault = fault;
}

/* Once in a process, in some 3 ms: called where there are dense blocks, whose faults cost as much. */
static bool measured(dt_session *s)
{
    int before = 0;
    if (!atomic_compare_exchange_strong(&measuring, &before, 1))
        return before == 2 && cost.fault;
    uint64_t page = dt_page_bytes(), step = APART * page, bytes = 2 * COPIES * page + FAULTS * step;
    uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) {
        madvise(memory, bytes, MADV_NOHUGEPAGE);
        memset(memory, 1, COPIES * page);
        measure(s, memory, step);
        munmap(memory, bytes);
    }
    atomic_store(&measuring, 2);
    return cost.fault;
}

/* A block that is told whole costs 64 copies in one piece; one that is armed, a fault, re-arming and a copy by itself for
 * each page that is written. */
static uint64_t threshold_for(const dt_adapt *a, const dt_wish *wish)
{
    if (a->eager)
        return 1;
    uint64_t whole = dt_max(wish->page_ns, wish->measured ? cost.copy : 0);
    uint64_t apart = dt_max(wish->page_ns, wish->measured ? cost.copy_apart : 0), each = cost.fault + cost.arm + apart;
    return dt_min(a->block_pages, a->block_pages * whole * 9 / 8 / each + 1); /* an eighth must be won */
}

/* ---- blocks ----------------------------------------------------------------------------------------------------- */

dt_adapt *dt_adapt_new(const dt_session *s, uint64_t start, uint64_t end)
{
    uint64_t first = dt_up(start, s->block_bytes), last = dt_down(end, s->block_bytes);
    bool eager = s->remedy & DT_REMEDY_EAGER;
    if (last < first + (eager ? 1 : LEAST_BLOCKS) * s->block_bytes)
        return NULL;
    dt_adapt *a = dt_alloc(sizeof *a + (last - first) / s->block_bytes * sizeof *a->blocks);
    if (!a)
        return NULL;
    a->block_bytes = s->block_bytes;
    a->block_pages = s->block_bytes / dt_page_bytes();
    a->start = first;
    a->end = last;
    a->eager = eager;
    return a;
}

static uint64_t block_of(const dt_adapt *a, uint64_t address) { return (address - a->start) / a->block_bytes; }

static uint64_t address_of(const dt_adapt *a, uint64_t block) { return a->start + block * a->block_bytes; }

void dt_adapt_forget(dt_adapt *a)
{
    uint64_t n = a ? block_of(a, a->end) : 0;
    for (uint64_t i = 0; i < n; i++)
        a->blocks[i].state = EXACT;
    if (a)
        a->not_exact = 0;
}

bool dt_adapt_next(const dt_adapt *a, uint64_t at, uint64_t end, uint64_t *to)
{
    uint64_t count = block_of(a, a->end), i = at < a->start ? 0 : dt_min(block_of(a, at), count);
    bool assumed = at >= a->start && i < count && a->blocks[i].state != EXACT;
    while (i < count && (a->blocks[i].state != EXACT) == assumed)
        i++;
    *to = i < count || assumed ? dt_min(end, address_of(a, i)) : end;
    return assumed;
}

bool dt_adapt_any(const dt_adapt *a) { return a && a->not_exact; }

/* Counted in registers: most runs are short, and follow one another in the same block. */
void dt_adapt_found(dt_adapt *a, const struct k_page_region *found, uint64_t n)
{
    unsigned shift = dt_page_shift();
    uint64_t block = 0, count = 0, total = 0;
    for (uint64_t i = 0; i < n; i++)
        for (uint64_t at = dt_max(found[i].start, a->start), end = dt_min(found[i].end, a->end), to; at < end; at = to) {
            uint64_t next = block_of(a, at);
            to = dt_min(end, address_of(a, next + 1));
            if (next != block) {
                a->blocks[block].found += (uint8_t)count;
                block = next;
                count = 0;
            }
            count += (to - at) >> shift;
            total += (to - at) >> shift;
        }
    a->blocks[block].found += (uint8_t)count;
    a->found += total;
    a->alive |= n > 0;
}

/* ---- samples ---------------------------------------------------------------------------------------------------- */

static uint64_t mixed(uint64_t x) { return x * 0x9e3779b97f4a7c15u >> 32; }

static void wait_for(heat *h, uint64_t block, uint64_t interval)
{
    h->interval = (uint16_t)interval;
    h->wait = (uint8_t)(interval / 2 + mixed(block + interval) % interval);
}

/* Whatever these scans find was told in this very pass, with all of its block. */
static int scan_sample(dt_session *s, dt_adapt *a, uint64_t block, bool arm, uint64_t *written)
{
    uint64_t start = address_of(a, block) + a->blocks[block].sample * dt_page_bytes();
    return dt_scan_apart(s, start, start + SAMPLE_PAGES * dt_page_bytes(), arm, written);
}

static int arm_blocks(dt_session *s, dt_adapt *a, uint64_t first, uint64_t last)
{
    uint64_t found;
    for (uint64_t i = first; i < last; i++) {
        heat *h = &a->blocks[i];
        h->state = EXACT;
        h->excess = h->passes = h->samples = h->written = 0;
    }
    a->not_exact -= last - first;
    return dt_scan_apart(s, address_of(a, first), address_of(a, last), true, &found);
}

static void ask_neighbours(dt_adapt *a, uint64_t block)
{
    uint64_t first = block > NEIGHBOURS ? block - NEIGHBOURS : 0, last = dt_min(block + NEIGHBOURS + 1, block_of(a, a->end));
    for (uint64_t i = first; i < last; i++)
        a->blocks[i].wait = 0;
}

static int ask(dt_session *s, dt_adapt *a, uint64_t block)
{
    heat *h = &a->blocks[block];
    uint64_t written;
    if (h->state == ASSUMED) {
        if (h->wait) {
            h->wait--;
            return 0;
        }
        h->state = SAMPLED;
        h->sample = (uint8_t)(mixed(block + h->interval) % (a->block_pages / SAMPLE_PAGES) * SAMPLE_PAGES);
        return scan_sample(s, a, block, true, &written);
    }
    int rc = scan_sample(s, a, block, false, &written);
    if (rc)
        return rc;
    a->sampled += SAMPLE_PAGES;
    a->written += written;
    a->cool += !h->samples && !written;
    h->samples++;
    h->written += (uint8_t)written;
    /* Well below what let it in, since a small sample says little and to come back costs faults. */
    if (5 * h->written * a->block_pages >= 3 * a->threshold * SAMPLE_PAGES * h->samples) {
        a->hot++;
        h->samples = h->written = 0;
        h->state = ASSUMED;
        wait_for(h, block, dt_min(2 * h->interval, LAST_INTERVAL));
        return 0;
    }
    if (h->samples < (h->written ? MOST_SAMPLES : 2)) { /* a part of a block may be cold: others are asked before it is believed */
        h->sample = (h->sample + 3 * SAMPLE_PAGES) % a->block_pages;
        return scan_sample(s, a, block, true, &written);
    }
    h->samples = h->written = 0;
    h->interval = 0;
    ask_neighbours(a, block);
    return arm_blocks(s, a, block, block + 1);
}

int dt_adapt_ask(dt_session *s, dt_adapt *a, uint64_t start, uint64_t end)
{
    int rc = 0;
    a->assumed += (end - start) >> dt_page_shift();
    for (uint64_t i = block_of(a, start), last = block_of(a, end); i < last && !rc; i++)
        rc = ask(s, a, i);
    return rc;
}

/* ---- deciding --------------------------------------------------------------------------------------------------- */

static void arm_all(dt_session *s, dt_adapt *a, uint64_t first, uint64_t last)
{
    for (uint64_t i = first, to; i < last; i = to) {
        bool assumed = a->blocks[i].state != EXACT;
        for (to = i + 1; to < last && (a->blocks[to].state != EXACT) == assumed; to++)
            ;
        if (assumed)
            arm_blocks(s, a, i, to); /* what it cannot arm, the next scan reports */
    }
}

/* Whether the costs are known by now. They are measured once it matters. */
static bool known(dt_session *s, dt_adapt *a, const dt_wish *wish)
{
    if (!a->eager && !measured(s))
        return false;
    a->threshold = threshold_for(a, wish);
    return true;
}

/* By the model and what was counted: what is not known of assumed pages is taken from the samples. */
static void account(dt_session *s, dt_adapt *a, uint64_t stay_exact)
{
    if (a->sampled > 1 << 20) {
        a->sampled /= 2;
        a->written /= 2;
    }
    uint64_t written = a->sampled ? a->assumed * a->written / a->sampled : a->assumed;
    s->statistics.faults_avoided += written;
    s->statistics.overhead_ns += a->found * (cost.fault + cost.arm) + (a->assumed - written) * cost.copy;
    s->statistics.predicted_ns += a->predicted_ns;
    uint64_t pages = a->not_exact * a->block_pages;
    a->predicted_ns = stay_exact * (cost.fault + cost.arm) + (a->sampled ? pages - pages * a->written / a->sampled : 0) * cost.copy;
    a->found = a->assumed = 0;
}

void dt_adapt_decide(dt_session *s, dt_adapt *a, uint64_t start, uint64_t end, const dt_wish *wish)
{
    uint64_t hot = a->hot, cool = a->cool;
    start = dt_max(dt_up(start, a->block_bytes), a->start);
    end = dt_min(end, a->end);
    a->hot = a->cool = 0;
    if (start >= end || !a->alive)
        return;
    uint64_t stay_exact = 0;
    uint64_t first = block_of(a, start), last = block_of(a, end);
    if (cool >= LEAST_VOTES && cool > hot)
        arm_all(s, a, first, last);
    if (a->threshold)
        a->threshold = threshold_for(a, wish);
    uint64_t threshold = a->threshold ? a->threshold : LEAST_DENSE;
    bool alive = false;
    for (uint64_t i = first; i < last; i++) {
        heat *h = &a->blocks[i];
        uint8_t found = h->found;
        if (!found && !h->excess)
            continue;
        h->found = 0;
        if (h->state != EXACT)
            continue;
        stay_exact += found;
        h->excess = (uint16_t)dt_min(h->excess + found > threshold ? h->excess + found - threshold : 0, UINT16_MAX);
        h->passes = h->excess ? (uint8_t)dt_min(h->passes + 1u, UINT8_MAX) : 0;
        alive |= h->excess > 0;
        if (h->excess < threshold || h->passes < (h->interval || a->eager ? 1 : LEAST_PASSES))
            continue;
        if (!a->threshold) {
            if (!known(s, a, wish))
                return;
            threshold = a->threshold;
            h->excess = h->passes = 0; /* counted against less: anew */
            continue;
        }
        stay_exact -= found;
        a->sampled += a->block_pages;
        a->written += found;
        h->state = ASSUMED;
        wait_for(h, i, a->eager ? 1 : FIRST_INTERVAL);
        a->not_exact++;
    }
    a->alive = alive || a->not_exact;
    account(s, a, stay_exact);
}
