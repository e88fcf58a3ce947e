/* SPDX-License-Identifier: MIT
 * Adaptive re-arming: pages that are rewritten epoch after epoch are left unarmed for a while, whole blocks of them where
 * they lie densely, and single ones where a few are hot and the rest of their block is nearly idle.
 *
 * An armed page costs its writer a fault, which is twenty times what finding it costs us. A page that is left unarmed is
 * assumed: each collecting pass over it tells it to everybody. That makes it safe whatever is decided here: a page is
 * either told, or scanned, and the kernel calls each page written that is not armed.
 *
 * Whether a block is still hot is asked of a sample: a few of its pages are armed in one pass and counted in the next.
 * Blocks take turns, so that each pass asks some of them, and what they say together tells a change of phase at once. */
#include "engine.h"
#include <assert.h>

#define SAMPLE_PAGES 8u
#define MOST_SAMPLES 4u     /* in a row, while they say that a block has cooled */
#define LEAST_PASSES 2u     /* before a block is assumed for the first time */
#define FIRST_INTERVAL 16u  /* passes from one sample of a block to the next; it doubles while the block stays hot */
#define LAST_INTERVAL 64u   /* and so bounds for how long a cold block may be told whole */
#define NEIGHBOURS 16u      /* blocks at either side that are asked next where one has cooled */
#define LEAST_VOTES 4u      /* samples of one pass that must have cooled, and be the most, to arm all blocks again */
#define LEAST_DENSE 4u      /* pages: below that, what things cost need not be known */
#define LEAST_BLOCKS 8u     /* below 2 MiB there is little to win */
#define WINDOW 4u           /* passes in a row that must find a page before it is assumed by itself */
#define LEAST_STEADY 64u    /* such pages: below that, what things cost need not be known */
#define DULL 8u             /* passes in a row in which nothing was worth it: after these it looks at */
#define LOOKS 2u            /* so many passes in a row, of */
#define TURN 6u             /* so many: deciding costs a few percent of each scan that it accompanies */
#define NEAR 16u            /* blocks: to ask again about so many costs about as much as a call that leaves them out */

/* MIXED: the pages of the mask are assumed. TURNED: all of it is being armed again. ASKED: it was, and what is found says
 * which pages of the mask are still hot. READY: to be mixed, if its neighbours help to pay for it. */
enum { EXACT, ASSUMED, SAMPLED, MIXED, TURNED, ASKED, READY };

typedef struct heat {       /* 16 bytes a block */
    uint64_t mask;          /* a bit a page. EXACT: found by each pass of the window; else see the states */
    union {
        struct {
            uint8_t found;  /* pages that the pass under way found */
            uint8_t state : 4;
            uint8_t count : 4; /* SAMPLED: samples in a row, of one question; EXACT: passes in the window */
            uint16_t excess; /* pages found in `passes` beyond the threshold; MIXED: beside the mask */
        };
        uint32_t any;       /* 0: all of these are, and there is nothing to decide */
    };
    uint8_t passes;         /* exact ones since `excess` was 0; MIXED: since it is; ASSUMED: how often it was asked */
    uint8_t interval;       /* the last one; 0: it was not assumed since it last was cold */
    uint8_t wait;           /* passes until it is sampled or asked */
    union {
        uint8_t written;    /* SAMPLED: pages of the samples that were written; ASKED: pages of the mask before */
        uint8_t sum;        /* EXACT: pages found in the window */
    };
} heat;
static_assert(sizeof(heat) == 16, "of which the mask is a bit a page");

struct dt_adapt {
    uint64_t block_bytes, block_pages;
    unsigned block_shift;
    bool eager;             /* DT_REMEDY_EAGER */
    uint64_t start, end;    /* the whole blocks of the region, which begin at multiples of a block */
    uint64_t not_exact;     /* blocks that are left unarmed whole */
    uint64_t single;        /* pages of mixed blocks that are left unarmed */
    uint64_t threshold;     /* pages found in a pass: from so many on, a block is cheaper unarmed; 0: not known yet */
    uint64_t hot, cool;     /* what the samples of the pass under way said */
    uint64_t found, assumed; /* pages, in the pass under way */
    uint64_t predicted_ns;  /* what the pass under way was to cost */
    uint64_t sampled, written; /* pages of all samples, and those that were written: how dense assumed blocks are */
    bool much;              /* the last pass told more than is copied through the caches */
    uint8_t dull, turn;     /* passes in a row in which nothing was worth it, up to DULL; and since then, modulo TURN */
    bool alive;             /* something was found since the last decision, or some block is not exact or was dense */
    uint64_t block, bits;   /* what the pass found in the block where it is now */
    heat blocks[];
};

/* What a page that is told costs whoever is told: one of a block told whole, and one by itself. Much is copied past the
 * caches, whether it changed or not; of little it is compared first. */
static uint64_t whole_ns(const dt_adapt *a, const dt_wish *wish)
{
    return dt_max(wish->page_ns, !wish->measured ? 0 : a->much ? dt_cost.copy : dt_cost.compare);
}

static uint64_t apart_ns(const dt_adapt *a, const dt_wish *wish)
{
    return dt_max(wish->page_ns, !wish->measured ? 0 : a->much ? dt_cost.copy_apart : dt_cost.compare);
}

/* A block that is told whole costs 64 copies in one piece, and the scan of what lies about it is two; one that is armed, a
 * fault, re-arming and a copy by itself for each page that is written. */
static uint64_t threshold_for(const dt_adapt *a, const dt_wish *wish)
{
    if (a->eager)
        return 1;
    uint64_t each = dt_cost.fault + dt_cost.arm + apart_ns(a, wish);
    uint64_t whole = a->block_pages * whole_ns(a, wish) + dt_cost.call;
    return dt_min(a->block_pages, whole * 9 / 8 / each + 1); /* an eighth must be won */
}

/* What a block wins in a pass by leaving the pages of its mask unarmed: a fault for each, but for a copy where one is
 * not written; and it loses a call for each gap between them where one of so many other pages is found, and the question
 * which of them these are. */
static int64_t gain_of(const dt_adapt *a, uint64_t mask, uint64_t others, const dt_wish *wish)
{
    uint64_t hot = dt_count_bits(mask), gaps = dt_count_bits(mask & ~(mask << 1)) + 1;
    if (a->eager)
        return hot > 0;
    return (int64_t)(hot * (dt_cost.fault + dt_cost.arm) * 4 / 5) - /* a fifth must be won: calls are dearer in cold caches */
           (int64_t)(dt_min(others, gaps) * dt_cost.call + a->block_pages * dt_cost.look +
                     hot * dt_min(apart_ns(a, wish), INT64_MAX >> 8) / (WINDOW + 2));
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
    a->block_shift = (unsigned)__builtin_ctzll(s->block_bytes);
    a->start = first;
    a->end = last;
    a->eager = eager;
    a->threshold = eager; /* which weighs nothing */
    return a;
}

void dt_adapt_prepare(dt_session *s, const dt_listener *l, const dt_region *region)
{
    bool may = l->adaptive && !l->exact && !region->present && region->granule == dt_page_bytes() &&
               region->end - region->start >= LEAST_BLOCKS * s->block_bytes;
    if (may && !s->compare && !s->suspended && !s->space && !(s->remedy & DT_REMEDY_EAGER))
        dt_costs_known(s);
}

static uint64_t block_of(const dt_adapt *a, uint64_t address) { return (address - a->start) >> a->block_shift; }

static uint64_t address_of(const dt_adapt *a, uint64_t block) { return a->start + (block << a->block_shift); }

void dt_adapt_forget(dt_adapt *a)
{
    uint64_t n = a ? block_of(a, a->end) : 0;
    for (uint64_t i = 0; i < n; i++)
        a->blocks[i].state = a->blocks[i].count = 0;
    if (a)
        a->not_exact = a->single = 0;
}

DT_HOT bool dt_adapt_any(const dt_adapt *a) { return a && (a->not_exact || a->single); }

static enum dt_way way_of(const heat *h)
{
    return h->state == ASSUMED || h->state == SAMPLED ? DT_WAY_ASSUMED : h->state == MIXED ? DT_WAY_MIXED : DT_WAY_EXACT;
}

enum dt_way dt_adapt_way(const dt_adapt *a, uint64_t at, uint64_t end, uint64_t *to)
{
    uint64_t count = block_of(a, a->end), i = at < a->start ? 0 : dt_min(block_of(a, at), count), near = NEAR;
    *to = end;
    if (i == count)
        return DT_WAY_EXACT;
    enum dt_way way = at < a->start ? DT_WAY_EXACT : way_of(&a->blocks[i]), here;
    uint64_t last = i; /* with it ends what is passed over in this way */
    for (; i < count && address_of(a, i) < end; i++) {
        here = way_of(&a->blocks[i]);
        if (here == way)
            last = i + 1;
        else if (way != DT_WAY_MIXED || here != DT_WAY_EXACT || i - last >= near)
            break;
    }
    if (way != DT_WAY_EXACT || (i < count && address_of(a, i) < end))
        *to = dt_min(end, address_of(a, last));
    return way;
}

/* A word of the mask, or of a block that is assumed whole, begins at a page of its own. */
static uint64_t unarmed(const heat *h)
{
    enum dt_way way = way_of(h);
    return way == DT_WAY_ASSUMED ? ~(uint64_t)0 : way == DT_WAY_MIXED ? h->mask : 0;
}

bool dt_adapt_next(const dt_adapt *a, uint64_t at, uint64_t end, uint64_t *from, uint64_t *to)
{
    unsigned shift = dt_page_shift();
    uint64_t stop = dt_min(end, a->end);
    bool found = false;
    *from = *to = end;
    for (at = dt_max(at, a->start); at < stop;) {
        uint64_t block = block_of(a, at), base = address_of(a, block), next = dt_min(stop, base + a->block_bytes);
        uint64_t bits = unarmed(&a->blocks[block]) >> ((at - base) >> shift);
        uint64_t away = found ? ~bits : bits; /* the first page that changes it */
        uint64_t there = away ? at + ((uint64_t)__builtin_ctzll(away) << shift) : next;
        if (there >= next) {
            at = next;
            continue;
        }
        if (found) {
            *to = there;
            return true;
        }
        found = true;
        *from = at = there;
    }
    if (found)
        *to = stop;
    return found;
}

/* What the pass found in one block, in one go. Of blocks that are tracked exactly each is in another place of its window:
 * no branch would be predicted. */
static inline uint64_t count_found(heat *h, uint64_t bits)
{
    uint64_t pages = dt_count_bits(bits), mask = h->mask;
    if (DT_LIKELY(h->state == EXACT)) {
        bool first = !h->found;
        h->count = first & !(mask & bits) ? 0 : h->count; /* none of the window's pages: another begins with this pass */
        uint64_t begins = -(uint64_t)!h->count, before = -(uint64_t)!first;
        h->mask = (begins & ((mask & before) | bits)) | (~begins & mask & bits);
    } else if (h->state == ASKED) {
        h->mask &= bits;
    }
    h->found += (uint8_t)pages;
    return pages;
}

/* Counted in registers: most runs are short, most of one page, and follow one another in the same block. */
void dt_adapt_found(dt_adapt *a, const struct k_page_region *found, uint64_t n)
{
    unsigned shift = dt_page_shift(), block_shift = a->block_shift - shift;
    uint64_t block = a->block, bits = a->bits, start = a->start, all = a->end, pages = a->block_pages;
    a->alive |= n > 0;
    for (; n && found->start < start; found++, n--) /* in no whole block, or in part */
        if (found->end > start)
            break;
    for (uint64_t i = 0; i < n && found[i].start < all; i++) {
        uint64_t first = (dt_max(found[i].start, start) - start) >> shift, end = (dt_min(found[i].end, all) - start) >> shift;
        while (first < end) {
            if (DT_UNLIKELY(first >> block_shift != block)) {
                if (bits)
                    a->found += count_found(&a->blocks[block], bits);
                block = first >> block_shift;
                bits = 0;
            }
            uint64_t bit = first & (pages - 1);
            if (DT_LIKELY(end - first == 1)) {
                bits |= (uint64_t)1 << bit;
                break;
            }
            uint64_t some = dt_min(end - first, pages - bit);
            bits |= ~(uint64_t)0 >> (64 - some) << bit;
            first += some;
        }
    }
    a->block = block;
    a->bits = bits;
}

/* ---- samples ---------------------------------------------------------------------------------------------------- */

/* Where there are few blocks they take turns more often, so that there are samples in each pass to tell a change by. */
static uint64_t longest_interval(const dt_adapt *a)
{
    return dt_max(FIRST_INTERVAL, dt_min(a->not_exact / LEAST_VOTES, LAST_INTERVAL));
}

static uint64_t mixed(uint64_t x) { return x * 0x9e3779b97f4a7c15u >> 32; }

static void wait_for(heat *h, uint64_t block, uint64_t interval)
{
    h->interval = (uint16_t)interval;
    h->wait = (uint8_t)(interval / 2 + mixed(block + interval) % interval);
}

/* Whatever these scans find was told in this very pass, with all of its block. */
static int scan_sample(dt_session *s, dt_adapt *a, uint64_t block, bool arm, uint64_t *written)
{
    const heat *h = &a->blocks[block];
    uint64_t sample = (mixed(block) + 3u * (h->passes + h->count)) % (a->block_pages / SAMPLE_PAGES);
    uint64_t start = address_of(a, block) + sample * SAMPLE_PAGES * dt_page_bytes();
    return dt_scan_apart(s, start, start + SAMPLE_PAGES * dt_page_bytes(), arm, written);
}

static int arm_blocks(dt_session *s, dt_adapt *a, uint64_t first, uint64_t last)
{
    uint64_t found;
    for (uint64_t i = first; i < last; i++) {
        heat *h = &a->blocks[i];
        h->state = EXACT;
        h->excess = h->passes = h->count = 0;
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

void dt_adapt_turn(dt_adapt *a, uint64_t start, uint64_t end)
{
    for (uint64_t i = block_of(a, start), last = block_of(a, end - 1); i <= last; i++) {
        heat *h = &a->blocks[i];
        if (h->state != MIXED)
            continue;
        uint64_t pages = dt_count_bits(h->mask);
        a->assumed += pages;
        if (h->wait) {
            h->wait--;
            continue;
        }
        h->state = TURNED;
        h->written = (uint8_t)pages;
        a->single -= pages;
    }
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
        h->passes++; /* another part each time */
        h->count = h->written = 0;
        return scan_sample(s, a, block, true, &written);
    }
    int rc = scan_sample(s, a, block, false, &written);
    if (rc)
        return rc;
    a->sampled += SAMPLE_PAGES;
    a->written += written;
    a->cool += !h->count && !written;
    h->count++;
    h->written += (uint8_t)written;
    /* Well below what let it in, since a small sample says little and to come back costs faults. */
    if (5 * h->written * a->block_pages >= 3 * a->threshold * SAMPLE_PAGES * h->count) {
        a->hot++;
        h->state = ASSUMED;
        wait_for(h, block, dt_min(2 * h->interval, longest_interval(a)));
        return 0;
    }
    if (h->count < (h->written ? MOST_SAMPLES : 2)) /* a part of a block may be cold: others are asked before it is believed */
        return scan_sample(s, a, block, true, &written);
    h->interval = 0;
    if (4 * h->written * a->block_pages < a->threshold * SAMPLE_PAGES * h->count) /* not for what is on the border by chance */
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
        bool assumed = way_of(&a->blocks[i]) == DT_WAY_ASSUMED;
        a->blocks[i].wait = 0; /* of mixed ones not all pages were told in this pass: the next arms them */
        for (to = i + 1; to < last && assumed && way_of(&a->blocks[to]) == DT_WAY_ASSUMED; to++)
            ;
        if (assumed)
            arm_blocks(s, a, i, to); /* what it cannot arm, the next scan reports */
    }
}

/* Whether the costs are known: most often since the listener was started. */
static bool known(dt_session *s, dt_adapt *a, const dt_wish *wish)
{
    if (!dt_costs_known(s))
        return false;
    a->threshold = threshold_for(a, wish);
    return true;
}

/* By the model and what was counted: what is not known of assumed pages is taken from the samples. */
static void account(dt_session *s, dt_adapt *a, uint64_t stay_exact, const dt_wish *wish)
{
    uint64_t whole = whole_ns(a, wish);
    if (a->sampled > 1 << 20) {
        a->sampled /= 2;
        a->written /= 2;
    }
    uint64_t written = a->sampled ? a->assumed * a->written / a->sampled : a->assumed;
    s->statistics.faults_avoided += written;
    s->statistics.overhead_ns += a->found * (dt_cost.fault + dt_cost.arm) + (a->assumed - written) * whole;
    s->statistics.predicted_ns += a->predicted_ns;
    uint64_t pages = a->not_exact * a->block_pages + a->single;
    a->predicted_ns = stay_exact * (dt_cost.fault + dt_cost.arm) + (a->sampled ? pages - pages * a->written / a->sampled : 0) * whole;
    a->found = a->assumed = 0;
}

bool dt_adapt_rests(dt_adapt *a)
{
    if (a->dull < DULL || dt_adapt_any(a))
        return false;
    a->turn = (uint8_t)((a->turn + 1u) % TURN);
    return a->turn >= LOOKS;
}

void dt_adapt_rested(dt_session *s, dt_adapt *a, uint64_t found)
{
    s->statistics.overhead_ns += found * (dt_cost.fault + dt_cost.arm);
    s->statistics.predicted_ns += a->predicted_ns;
}

/* Blocks that are ready to be mixed, or are, with no more than a few between them: they share what it costs to pass over
 * them in another way than the rest. */
typedef struct stretch { uint64_t first, last; int64_t gain; bool any; } stretch;

static void end_stretch(dt_adapt *a, stretch *blocks)
{
    for (uint64_t i = blocks->first; blocks->any && i <= blocks->last; i++) {
        heat *h = &a->blocks[i];
        if (h->state != READY)
            continue;
        h->state = blocks->gain > 0 ? MIXED : EXACT;
        h->excess = h->passes = h->count = 0;
        a->single += h->state == MIXED ? dt_count_bits(h->mask) : 0;
        wait_for(h, i, a->eager && !h->interval ? 1 : dt_min(h->interval ? 2 * h->interval : FIRST_INTERVAL, LAST_INTERVAL));
        h->interval = h->state == MIXED ? h->interval : 0;
    }
    blocks->any = false;
}

static void add_to_stretch(dt_adapt *a, stretch *blocks, uint64_t i, int64_t gain)
{
    int64_t alone = a->eager ? 0 : 2 * (int64_t)dt_cost.call;
    if (blocks->any && i - blocks->last > NEAR)
        end_stretch(a, blocks);
    if (blocks->any)
        blocks->gain -= a->eager ? 0 : (int64_t)((i - blocks->last - 1) * a->block_pages * dt_cost.look);
    else
        *blocks = (stretch){.first = i, .gain = -alone, .any = true};
    blocks->last = i;
    blocks->gain += a->blocks[i].state == MIXED ? alone : gain;
}

/* What a pass found of a block where single pages are assumed, or that was asked about them. */
static void decide_mixed(dt_adapt *a, uint64_t i, uint64_t found, const dt_wish *wish, stretch *blocks)
{
    heat *h = &a->blocks[i];
    uint64_t hot = found ? dt_count_bits(h->mask) : 0;
    if (h->state == MIXED) {
        h->excess = (uint16_t)dt_min(h->excess + found, UINT16_MAX);
        h->passes = (uint8_t)dt_min(h->passes + 1u, UINT8_MAX);
        if (found > 2 * hot + 2) /* something else goes on there by now */
            h->wait = 0;
        add_to_stretch(a, blocks, i, 0);
        return;
    }
    if (h->state == TURNED) {
        h->state = ASKED;
        return;
    }
    a->sampled += h->written;
    a->written += hot;
    a->cool += !hot;
    a->hot += 2 * hot >= h->written;
    int64_t gain = hot ? gain_of(a, h->mask, h->excess / dt_max(h->passes, 1), wish) : 0;
    h->state = gain > 0 ? READY : EXACT;
    if (gain > 0) {
        add_to_stretch(a, blocks, i, gain);
        return;
    }
    h->interval = 0;
    h->excess = h->passes = h->count = 0;
    if (!hot)
        ask_neighbours(a, i);
}

/* Whether a block that is tracked exactly is dense: as many pages as that, pass after pass. */
static bool is_dense(const dt_adapt *a, heat *h, uint64_t found, uint64_t threshold)
{
    h->excess = (uint16_t)dt_min(h->excess + found > threshold ? h->excess + found - threshold : 0, UINT16_MAX);
    h->passes = h->excess ? (uint8_t)dt_min(h->passes + 1u, UINT8_MAX) : 0;
    return h->excess >= threshold && h->passes >= (h->interval || a->eager ? 1 : LEAST_PASSES);
}

/* Whether a window ends with this pass, each of which found the pages of the mask. */
static bool is_steady(const dt_adapt *a, heat *h, uint64_t found)
{
    h->sum = (uint8_t)dt_min((h->count ? h->sum : 0) + found, UINT8_MAX);
    h->count = found && h->mask ? h->count + 1u : 0;
    return h->count >= (a->eager ? 2 : WINDOW);
}

void dt_adapt_decide(dt_session *s, dt_adapt *a, uint64_t start, uint64_t end, const dt_wish *wish)
{
    uint64_t hot = a->hot, cool = a->cool;
    start = dt_max(dt_up(start, a->block_bytes), a->start);
    end = dt_min(end, a->end);
    a->hot = a->cool = 0;
    if (start >= end || !a->alive)
        return;
    uint64_t stay_exact = 0, steady = 0;
    uint64_t first = block_of(a, start), last = block_of(a, end);
    if (a->bits)
        a->found += count_found(&a->blocks[a->block], a->bits);
    a->bits = 0;
    a->much = (a->found + a->assumed) << dt_page_shift() >= dt_copy_past_from;
    if (cool >= LEAST_VOTES && cool > hot)
        arm_all(s, a, first, last);
    if (a->threshold)
        a->threshold = threshold_for(a, wish);
    uint64_t threshold = a->threshold ? a->threshold : LEAST_DENSE;
    stretch blocks = {.any = false};
    uint64_t again = 0;
    bool alive = false, worth = dt_adapt_any(a);
    for (uint64_t i = first; i < last; i++) {
        heat *h = &a->blocks[i];
        uint8_t found = h->found;
        if (!h->any)
            continue;
        h->found = 0;
        if (way_of(h) == DT_WAY_ASSUMED) {
            end_stretch(a, &blocks);
            continue;
        }
        alive = true;
        stay_exact += found;
        if (h->state != EXACT) {
            worth = true;
            decide_mixed(a, i, found, wish, &blocks);
            continue;
        }
        bool dense = is_dense(a, h, found, a->eager && i % 2 ? UINT8_MAX : threshold), steady_now = is_steady(a, h, found);
        worth |= h->excess > 0;
        again += h->count > 1 ? dt_count_bits(h->mask) : 0;
        if (!steady_now && !dense)
            continue;
        if (!dense) {
            h->count = 0;
            steady += dt_count_bits(h->mask);
        }
        if (!a->threshold) {
            if (!dense) { /* the next pass decides, with what things cost */
                h->count = WINDOW - 1;
                h->sum = (uint8_t)(h->sum * (WINDOW - 1) / WINDOW);
            }
            if (!dense && steady < LEAST_STEADY)
                continue;
            if (!known(s, a, wish))
                return;
            threshold = a->threshold;
            h->excess = h->passes = 0; /* counted against less: anew */
            continue;
        }
        if (!dense) {
            uint64_t pages = dt_count_bits(h->mask), found_each = h->sum / (a->eager ? 2 : WINDOW);
            int64_t gain = gain_of(a, h->mask, found_each > pages ? found_each - pages : 0, wish);
            if (gain > 0) {
                h->state = READY;
                add_to_stretch(a, &blocks, i, gain);
            }
            continue;
        }
        end_stretch(a, &blocks);
        stay_exact -= found;
        a->sampled += a->block_pages;
        a->written += found;
        h->state = ASSUMED;
        wait_for(h, i, a->eager ? 1 : FIRST_INTERVAL);
        a->not_exact++;
    }
    end_stretch(a, &blocks);
    a->dull = worth || 2 * again > stay_exact ? 0 : (uint8_t)dt_min(a->dull + 1u, DULL);
    a->alive = alive || a->not_exact;
    account(s, a, stay_exact, wish);
}
