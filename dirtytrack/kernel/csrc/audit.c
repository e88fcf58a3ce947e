/* SPDX-License-Identifier: MIT
 * The audit: hashes of a sample of pages. A page whose hash changed though no scan reported it was missed. */
#include "engine.h"
#include <math.h>

enum { AUDIT_ROTATION = 8 }; /* one slot in so many moves to another page at each collect */

/* Not against an adversary: against the kernel, or us, being wrong. Four lanes of multiply and fold. */
static uint64_t hash_page(const uint64_t *words, uint64_t n)
{
    uint64_t h[4] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u};
    for (uint64_t i = 0; i + 4 <= n; i += 4)
        for (int k = 0; k < 4; k++) {
            h[k] = (h[k] ^ words[i + (uint64_t)k]) * 0xff51afd7ed558ccdu;
            h[k] ^= h[k] >> 32;
        }
    return (h[0] ^ (h[1] << 16 | h[1] >> 48)) + (h[2] ^ (h[3] << 32 | h[3] >> 32));
}

static uint64_t next_random(dt_listener *l)
{
    uint64_t x = l->audit_random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return l->audit_random = x;
}

static uint64_t page_by_number(const dt_listener *l, uint64_t number)
{
    for (uint64_t i = 0; i < l->watch_count; i++) {
        const dt_watch *w = l->watches[i];
        uint64_t pages = (w->end - w->start) >> dt_page_shift();
        if (number < pages)
            return w->start + (number << dt_page_shift());
        number -= pages;
    }
    return 0;
}

static uint64_t pages_of(const dt_listener *l)
{
    uint64_t pages = 0;
    for (uint64_t i = 0; i < l->watch_count; i++)
        pages += (l->watches[i]->end - l->watches[i]->start) >> dt_page_shift();
    return pages;
}

static bool read_hash(uint64_t page, uint64_t *hash)
{
    uint64_t words[8192]; /* pages of up to 64 KiB */
    uint64_t bytes = dt_page_bytes();
    dt_run run = {page, page + bytes};
    dt_set one = {.runs = &run, .count = 1};
    dt_extent extent = {.address = page, .nbytes = bytes, .unpinned = 1};
    if (bytes > sizeof words || dt_gather(&one, &extent, 1, (uint8_t *)words, bytes, NULL))
        return false; /* a page that is gone is not this check's business */
    *hash = hash_page(words, bytes / 8);
    return true;
}

static const dt_watch *watching(const dt_listener *l, uint64_t page)
{
    for (uint64_t i = 0; i < l->watch_count; i++)
        if (l->watches[i]->start <= page && page < l->watches[i]->end)
            return l->watches[i];
    return NULL;
}

int dt_audit_add(dt_listener *l, const dt_watch *w)
{
    uint64_t kept = 0, pages = (w->end - w->start) >> dt_page_shift();
    uint64_t more = (uint64_t)ceil((double)pages * l->audit_fraction);
    for (uint64_t i = 0; i < l->audit_count; i++) /* those of regions that were removed go */
        if (watching(l, l->audit[i].page))
            l->audit[kept++] = l->audit[i];
    l->audit_count = kept;
    if (dt_room((void **)&l->audit, &l->audit_room, kept + more, sizeof *l->audit))
        return -ENOMEM;
    for (uint64_t i = 0; i < more; i++) {
        uint64_t number = more == pages ? i : next_random(l) % pages;
        dt_audit_slot *slot = &l->audit[l->audit_count++];
        slot->page = w->start + (number << dt_page_shift());
        slot->valid = read_hash(slot->page, &slot->hash);
    }
    return 0;
}

int dt_audit_start(dt_listener *l)
{
    l->audit_count = 0;
    l->audit_random = dt_now_ns() | 1;
    for (uint64_t i = 0; i < l->watch_count; i++)
        if (dt_audit_add(l, l->watches[i]))
            return -ENOMEM;
    return 0;
}

void dt_audit_skip(dt_listener *l, const dt_set *found)
{
    for (uint64_t i = 0; i < l->audit_count; i++)
        if (dt_set_contains(found, l->audit[i].page))
            l->audit[i].valid = false;
}

/* After the scan re-armed. A hash that changed is no proof by itself: a thread may have written since the scan. Then the
 * page is written by the kernel's word, too: the fault comes before the store. Asked after the hash was read. */
int dt_audit_check(dt_listener *l, dt_set *found)
{
    dt_session *s = l->session;
    uint64_t pages = pages_of(l), missed = 0;
    bool any = false;
    for (uint64_t i = 0; i < l->audit_count; i++) {
        dt_audit_slot *slot = &l->audit[i];
        uint64_t hash = 0;
        bool reported = dt_set_contains(found, slot->page);
        const dt_watch *w = watching(l, slot->page);
        if (!w) {
            slot->valid = false;
        } else if (!slot->valid || reported) {
            slot->valid = read_hash(slot->page, &slot->hash);
        } else if (read_hash(slot->page, &hash) && hash != slot->hash) {
            if (dt_page_written(s, slot->page) == 0) {
                missed = slot->page;
                any = true;
                found->why.region = w->region->id;
                dt_mark_all(s->watches, s->watch_count, slot->page, slot->page + dt_page_bytes());
            }
            slot->hash = hash;
        }
        s->statistics.pages_audited += slot->valid;
        if (pages && l->audit_count < pages && (i + l->epoch) % AUDIT_ROTATION == 0 && !any) {
            slot->page = page_by_number(l, next_random(l) % pages);
            slot->valid = read_hash(slot->page, &slot->hash);
        }
    }
    return any ? dt_fail_with(&found->why, DT_MISSED, 0, DT_STEP_SCAN, missed, missed + dt_page_bytes()) : 0;
}
