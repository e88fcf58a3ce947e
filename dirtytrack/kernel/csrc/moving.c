/* SPDX-License-Identifier: MIT
 * Pages on the move: read, told apart from what the other side has, and put where they belong.
 *
 * Each page is read once, into the caller's buffer; whether it is zero, what its digest is and what is sent are all of
 * that one reading, whoever writes it meanwhile. What is written after it, the tracker tells in the next round. */
#include <sys/mman.h>
#include "digest.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

static dt_digester digester(void)
{
    static _Atomic(dt_digester) chosen;
    dt_digester digest = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (DT_UNLIKELY(!digest))
        atomic_store_explicit(&chosen, digest = dt_choose_digester(false), memory_order_relaxed);
    return digest;
}

static dt_copier copier(void)
{
    static _Atomic(dt_copier) chosen;
    dt_copier copy = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (DT_UNLIKELY(!copy))
        atomic_store_explicit(&chosen, copy = dt_choose_copier(false), memory_order_relaxed);
    return copy;
}

void dt_page_digest(const uint8_t *page, uint64_t page_bytes, const uint8_t *key, uint64_t *out)
{
    dt_digest found = digester()(page, page_bytes, key);
    out[0] = found.first;
    out[1] = found.second;
}

uint64_t dt_set_step(const dt_set *set, uint64_t from, uint64_t pages)
{
    for (uint64_t i = dt_set_first(set, from), left = pages << dt_page_shift(); i < set->count; i++) {
        uint64_t at = dt_max(set->runs[i].start, from), room = set->runs[i].end - at;
        if (left < room)
            return at + left;
        left -= room;
        if (!left && i + 1 < set->count)
            return set->runs[i + 1].start;
    }
    return UINT64_MAX;
}

/* ---- reading ---- */

/* The part of a page that is the memory's: where, how long, and how far into the page. False where there is none. */
static bool own_part(const dt_moving *m, uint64_t page, uint64_t *address, uint64_t *bytes, uint64_t *shift)
{
    uint64_t from = page * m->page_bytes, to = from + m->page_bytes, end = m->phase + m->memory.nbytes;
    from = dt_max(from, m->phase);
    to = dt_min(to, end);
    if (page >= m->pages || from >= to)
        return false;
    *address = m->memory.address + (from - m->phase);
    *bytes = to - from;
    *shift = from - page * m->page_bytes;
    return true;
}

static int read_page(const dt_moving *m, uint64_t page, uint8_t *out, dt_failure *why)
{
    uint64_t address, bytes, shift;
    if (!own_part(m, page, &address, &bytes, &shift)) {
        memset(out, 0, m->page_bytes);
        return 0;
    }
    if (DT_UNLIKELY(bytes < m->page_bytes)) {
        memset(out, 0, shift);
        memset(out + shift + bytes, 0, m->page_bytes - shift - bytes);
    }
    if (m->memory.through)
        return dt_compare_copy(m->memory.through, address, bytes, out + shift, why);
    if (m->memory.unpinned)
        return dt_copy_vanishing(false, out + shift, address, bytes, why);
    /* SAFETY: the caller holds the memory. */
    memcpy(out + shift, (const void *)(uintptr_t)address, bytes);
    return 0;
}

/* Where a page lies that is wholly the memory's, which the caller holds; NULL: it is to be read by read_page. */
static const uint8_t *whole_page(const dt_moving *m, uint64_t page)
{
    uint64_t address, bytes, shift;
    bool plain = !m->memory.through && !m->memory.unpinned;
    return plain && own_part(m, page, &address, &bytes, &shift) && bytes == m->page_bytes ? (void *)(uintptr_t)address : NULL;
}

/* A page and its digest, in one pass where it lies still. `out` may be left as it is: only the digest is wanted. */
static int read_digest(const dt_moving *m, uint64_t page, bool keep, dt_digester digest, uint8_t *out, dt_digest *now,
                       dt_failure *why)
{
    const uint8_t *whole = whole_page(m, page);
    if (whole) {
        /* SAFETY: the caller holds the memory. */
        *now = keep ? copier()(whole, m->page_bytes, m->key, out) : digest(whole, m->page_bytes, m->key);
        return 0;
    }
    int rc = read_page(m, page, out, why);
    if (!rc)
        *now = digest(out, m->page_bytes, m->key);
    return rc;
}

static void tell(dt_stretch *stretches, dt_moved *moved, uint64_t page, uint32_t kind)
{
    dt_stretch *last = stretches + moved->stretches - 1;
    if (moved->stretches && last->kind == kind && last->first + last->count == page) {
        last->count++;
        return;
    }
    stretches[moved->stretches++] = (dt_stretch){page, 1, kind};
}

/* What the other side has is what was sent last, if its digest says so: it may have something else from an earlier try. */
static void pack(const dt_moving *m, dt_sent *sent, uint64_t page, const uint64_t *known, const dt_digest *now, const uint8_t *data)
{
    uint8_t *before = sent->bytes + page * m->page_bytes;
    uint64_t *told = sent->table + 2 * page;
    bool same = known[0] == told[0] && known[1] == told[1];
    if (data)
        sent->packed_bytes += dt_moving_pack(data, same ? before : NULL, m->page_bytes, sent->packed + sent->packed_bytes);
    if (data)
        memcpy(before, data, m->page_bytes);
    else
        memset(before, 0, m->page_bytes);
    told[0] = now->first;
    told[1] = now->second;
}

static int take_page(const dt_moving *m, uint64_t page, dt_digester digest, const dt_digest *zero, dt_stretch *stretches,
                     uint64_t *digests, uint8_t *out, dt_sent *sent, dt_moved *moved, dt_failure *why)
{
    uint8_t *to = out + moved->data_pages * m->page_bytes;
    uint64_t *known = m->table + 2 * page;
    dt_digest now;
    int rc = read_digest(m, page, true, digest, to, &now, why);
    if (rc)
        return rc;
    if (known[0] == now.first && known[1] == now.second && (now.first | now.second)) {
        moved->same_pages++;
        return 0;
    }
    bool is_zero = now.first == zero->first && now.second == zero->second && dt_is_zero(to, m->page_bytes);
    if (sent)
        pack(m, sent, page, known, &now, is_zero ? NULL : to);
    known[0] = now.first;
    known[1] = now.second;
    if (is_zero) {
        tell(stretches, moved, page, DT_STRETCH_ZERO);
        moved->zero_pages++;
        return 0;
    }
    tell(stretches, moved, page, DT_STRETCH_DATA);
    digests[2 * moved->data_pages] = now.first;
    digests[2 * moved->data_pages + 1] = now.second;
    moved->data_pages++;
    return 0;
}

static dt_digest zero_digest(const dt_moving *m, dt_digester digest)
{
    static const uint8_t zeros[65536];
    return digest(zeros, m->page_bytes, m->key);
}

static bool usable(const dt_moving *m)
{
    uint64_t page = m->page_bytes;
    return page >= 4096 && page <= 65536 && !(page & (page - 1)) && m->phase < page &&
           m->memory.nbytes <= UINT64_MAX - 2 * page && m->pages == dt_up(m->phase + m->memory.nbytes, page) / page;
}

int dt_moving_take(const dt_moving *m, const dt_set *set, uint64_t from, uint64_t to, dt_stretch *stretches,
                   uint64_t *digests, uint8_t *out, uint64_t room, dt_sent *sent, dt_moved *moved, dt_failure *why)
{
    uint64_t page_bytes = dt_page_bytes(), start = m->memory.address - m->phase;
    if (!usable(m) || m->page_bytes != page_bytes || start & (page_bytes - 1))
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_COPY, 0, 0);
    dt_digester digest = digester();
    dt_digest zero = zero_digest(m, digest);
    dt_moved did = {0};
    uint64_t looked = 0;
    if (sent)
        sent->packed_bytes = 0;
    from = dt_max(from, start);
    to = dt_min(to, start + m->pages * page_bytes);
    int fail = dt_fail_at(DT_SITE_COPY);
    int rc = fail > 0 ? dt_fail_with(why, -fail, fail, DT_STEP_COPY, from, to) : 0;
    bool locked = !rc && m->memory.through && !(rc = dt_compare_begin_copy(m->memory.through, why));
    for (uint64_t i = dt_set_first(set, from); !rc && i < set->count && set->runs[i].start < to; i++) {
        uint64_t end = dt_min(set->runs[i].end, to);
        for (uint64_t at = dt_max(set->runs[i].start, from); !rc && at < end; at += page_bytes, looked++) {
            if (looked == room)
                rc = dt_fail_with(why, DT_TOO_SMALL, 0, DT_STEP_COPY, 0, 0);
            else
                rc = take_page(m, (at - start) / page_bytes, digest, &zero, stretches, digests, out, sent, &did, why);
        }
    }
    if (locked)
        dt_compare_end_copy(m->memory.through);
    if (!rc)
        *moved = did;
    return rc;
}

/* ---- writing ---- */

static int write_page(const dt_moving *m, uint64_t page, const uint8_t *data, dt_failure *why)
{
    uint64_t address, bytes, shift;
    if (!own_part(m, page, &address, &bytes, &shift))
        return 0;
    if (m->memory.unpinned) {
        static const uint8_t zeros[65536];
        return dt_copy_vanishing(true, (uint8_t *)(uintptr_t)(data ? data + shift : zeros), address, bytes, why);
    }
    /* SAFETY: the caller holds the memory, and own_part() keeps to it. */
    if (data)
        memcpy((void *)(uintptr_t)address, data + shift, bytes);
    else
        memset((void *)(uintptr_t)address, 0, bytes);
    return 0;
}

static int malformed(dt_failure *why, uint64_t which) { return dt_fail_with(why, DT_MALFORMED, 0, DT_STEP_COPY, which, which); }

/* Whether the stretches are some, and how many pages of data they have. */
static bool sound(const dt_moving *m, const dt_stretch *stretches, uint64_t n, uint64_t *told, uint64_t *looked)
{
    *told = *looked = 0;
    for (uint64_t i = 0; i < n; i++) {
        dt_stretch s = stretches[i];
        if (!s.count || s.kind > DT_STRETCH_ZERO || s.first >= m->pages || s.count > m->pages - s.first)
            return false;
        *told += s.kind == DT_STRETCH_DATA ? s.count : 0;
        *looked += s.count;
    }
    return true;
}

/* Where pages that are wholly the memory's lie; 0 where they do not. */
static uint64_t place_of(const dt_moving *m, dt_stretch s)
{
    uint64_t from = s.first * m->page_bytes, to = from + s.count * m->page_bytes;
    return from < m->phase || to > m->phase + m->memory.nbytes ? 0 : m->memory.address + (from - m->phase);
}

/* Whether the kernel has no page there yet, as of memory that nobody wrote. */
static bool is_absent(uint64_t page)
{
    unsigned char there = 0;
    return !mincore((void *)(uintptr_t)page, dt_page_bytes(), &there) && !(there & 1);
}

int dt_moving_expect(const dt_moving *m, const dt_stretch *stretches, uint64_t n, uint64_t *places, dt_failure *why)
{
    uint64_t told, looked;
    if (!usable(m))
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_COPY, 0, 0);
    if (!sound(m, stretches, n, &told, &looked))
        return malformed(why, looked);
    for (uint64_t i = 0; i < n; i++) {
        places[i] = stretches[i].kind == DT_STRETCH_DATA ? place_of(m, stretches[i]) : 0;
        if (m->memory.unpinned || (stretches[i].kind == DT_STRETCH_DATA && !places[i]))
            return DT_TOO_SMALL;
    }
    dt_digest zero = zero_digest(m, digester());
    for (uint64_t i = 0; i < n; i++) {
        if (!places[i])
            continue;
        uint64_t *known = m->table + 2 * stretches[i].first, bytes = stretches[i].count * m->page_bytes;
        uint64_t low = dt_up(places[i], dt_page_bytes()), high = dt_down(places[i] + bytes, dt_page_bytes());
        /* Memory that nobody wrote comes quicker by one call than by a fault a page. Where it does not, the faults do it.
         * Of what is there the call would look at each page. */
        if (known[0] == zero.first && known[1] == zero.second && low < high && is_absent(low))
            (void)madvise((void *)(uintptr_t)low, high - low, MADV_POPULATE_WRITE);
        memset(known, 0, 16 * (uint64_t)stretches[i].count); /* until it is whole */
    }
    return 0;
}

int dt_moving_open(const dt_moving *m, const dt_stretch *stretches, uint64_t n, const uint8_t *packed, uint64_t length,
                   uint8_t *out, uint64_t nbytes, dt_failure *why)
{
    uint64_t told, looked, at = 0, k = 0;
    if (!usable(m))
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_COPY, 0, 0);
    if (!sound(m, stretches, n, &told, &looked) || nbytes % m->page_bytes || nbytes / m->page_bytes != told)
        return malformed(why, looked);
    for (uint64_t i = 0; i < n; i++)
        for (uint64_t p = 0; stretches[i].kind == DT_STRETCH_DATA && p < stretches[i].count; p++, k++) {
            int rc = read_page(m, stretches[i].first + p, out + k * m->page_bytes, why);
            if (rc)
                return rc;
            uint64_t took = dt_moving_unpack(packed + at, length - at, out + k * m->page_bytes, m->page_bytes);
            if (!took)
                return malformed(why, k);
            at += took;
        }
    return at == length ? 0 : malformed(why, k);
}

/* What came into its place is what it is said to be. */
static int settle(const dt_moving *m, const dt_stretch *stretches, uint64_t n, const uint64_t *digests, dt_failure *why)
{
    dt_digester digest = digester();
    for (uint64_t i = 0, k = 0; i < n; i++) {
        if (stretches[i].kind != DT_STRETCH_DATA)
            continue;
        uint64_t place = place_of(m, stretches[i]);
        if (!place || m->memory.unpinned)
            return dt_fail_with(why, -EINVAL, 0, DT_STEP_COPY, 0, 0);
        for (uint64_t p = 0; p < stretches[i].count; p++, k++) {
            /* SAFETY: the caller holds the memory, and place_of() keeps to it. */
            dt_digest now = digest((const uint8_t *)(uintptr_t)place + p * m->page_bytes, m->page_bytes, m->key);
            if (now.first != digests[2 * k] || now.second != digests[2 * k + 1])
                return malformed(why, k);
            m->table[2 * (stretches[i].first + p)] = now.first;
            m->table[2 * (stretches[i].first + p) + 1] = now.second;
        }
    }
    return 0;
}

int dt_moving_put(const dt_moving *m, const dt_stretch *stretches, uint64_t n, const uint64_t *digests,
                  const uint8_t *data, uint64_t nbytes, dt_failure *why)
{
    uint64_t told, looked;
    if (!usable(m))
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_COPY, 0, 0);
    if (!sound(m, stretches, n, &told, &looked) || nbytes % m->page_bytes || nbytes / m->page_bytes != told)
        return malformed(why, looked);
    dt_digester digest = digester();
    dt_digest zero = zero_digest(m, digest);
    int rc = data ? 0 : settle(m, stretches, n, digests, why);
    if (rc)
        return rc;
    for (uint64_t i = 0; data && i < told; i++) {
        dt_digest now = digest(data + i * m->page_bytes, m->page_bytes, m->key);
        if (now.first != digests[2 * i] || now.second != digests[2 * i + 1])
            return malformed(why, i);
    }
    int fail = dt_fail_at(DT_SITE_COPY);
    if (fail > 0)
        return dt_fail_with(why, -fail, fail, DT_STEP_COPY, m->memory.address, m->memory.address + m->memory.nbytes);
    for (uint64_t i = 0, k = 0; i < n; i++)
        for (uint64_t page = stretches[i].first; page < stretches[i].first + stretches[i].count; page++) {
            bool is_data = stretches[i].kind == DT_STRETCH_DATA;
            uint64_t *known = m->table + 2 * page;
            if (is_data ? !data : known[0] == zero.first && known[1] == zero.second)
                continue; /* as it is; and what was never touched stays so */
            uint64_t now[2] = {is_data ? digests[2 * k] : zero.first, is_data ? digests[2 * k + 1] : zero.second};
            known[0] = known[1] = 0; /* until it is whole */
            rc = write_page(m, page, is_data ? data + k * m->page_bytes : NULL, why);
            if (rc)
                return rc;
            known[0] = now[0];
            known[1] = now[1];
            k += is_data;
        }
    return 0;
}

/* ---- looking again ---- */

int dt_moving_differing(const dt_moving *m, const dt_set *set, uint64_t every, uint64_t *looked, uint64_t *differing,
                        dt_failure *why)
{
    uint64_t start = m->memory.address - m->phase, seen = 0, differ = 0, i = 0;
    if (!usable(m) || m->page_bytes != dt_page_bytes() || !every)
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_COPY, 0, 0);
    dt_digester digest = digester();
    uint8_t *page = dt_alloc(m->page_bytes);
    if (!page)
        return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    int rc = 0;
    bool locked = m->memory.through && !(rc = dt_compare_begin_copy(m->memory.through, why));
    for (uint64_t run = dt_set_first(set, start); !rc && run < set->count; run++) {
        uint64_t at = dt_max(set->runs[run].start, start), end = dt_min(set->runs[run].end, start + m->pages * m->page_bytes);
        for (; !rc && at < end; at += m->page_bytes, i++) {
            dt_digest now = {0};
            uint64_t which = (at - start) / m->page_bytes;
            if (i % every)
                continue;
            rc = read_digest(m, which, false, digest, page, &now, why);
            seen++;
            differ += m->table[2 * which] != now.first || m->table[2 * which + 1] != now.second;
        }
    }
    if (locked)
        dt_compare_end_copy(m->memory.through);
    dt_free(page);
    if (!rc) {
        *looked = seen;
        *differing = differ;
    }
    return rc;
}

int dt_moving_digest(const dt_moving *m, uint64_t first, uint64_t count, int check, uint64_t *at, dt_failure *why)
{
    if (!usable(m) || first > m->pages || count > m->pages - first)
        return dt_fail_with(why, -EINVAL, 0, DT_STEP_COPY, 0, 0);
    dt_digester digest = digester();
    uint8_t *page = dt_alloc(m->page_bytes);
    if (!page)
        return dt_fail_with(why, -ENOMEM, ENOMEM, DT_STEP_MEMORY, 0, 0);
    int rc = 0;
    bool locked = m->memory.through && !(rc = dt_compare_begin_copy(m->memory.through, why));
    uint64_t i = first;
    for (; !rc && i < first + count; i++) {
        dt_digest now = {0};
        rc = read_digest(m, i, false, digest, page, &now, why);
        if (!rc && check && (m->table[2 * i] != now.first || m->table[2 * i + 1] != now.second))
            break;
        if (!rc && !check) {
            m->table[2 * i] = now.first;
            m->table[2 * i + 1] = now.second;
        }
    }
    if (locked)
        dt_compare_end_copy(m->memory.through);
    dt_free(page);
    if (!rc)
        *at = i;
    return rc;
}
