/* SPDX-License-Identifier: MIT
 * Which granules of a block differ: a line of 64 bytes at a time, by what the processor has.
 *
 * The memory may be written while it is read. What is copied is what was compared: each byte is loaded once.
 *
 * Two streams are read and one or two are written, out of memory and into it. What lies half a block ahead is fetched into
 * the second-level cache meanwhile, which has room for more fetches at once than the first (measured, Zen 4: a whole block
 * ahead is slower by a tenth, into the first-level cache by half); and where a lot is encoded, its bytes are written past
 * the caches, line by line between the loads (behind them, block by block, it takes half as long again). Whether all
 * granules of a block differ, or none, is gathered in registers: the mask is read again only where some do. */
#include "delta.h"

enum { LINE = 64, AHEAD = 32 };

/* Of the words that eight lines have each; a rest is not in it. */
typedef struct sum { uint64_t any, all; } sum;

/* Compares and copies `lines` lines. Of each line 64 >> shift bits go to `bits`, in whole words: they are loaded again at
 * once, and a load of what several stores made waits for all stores before. shift is 0 to 3. */
typedef sum snapshot_lines(dt_delta_part part, uint32_t lines, unsigned shift, uint64_t *bits);

#define INLINE static inline __attribute__((always_inline))

/* X(0) to X(7): compilers unroll by themselves at some levels only. */
#define EIGHT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

/* Adds the bits of line i of eight to the word that they are in, and puts that where it is whole. */
INLINE void put(uint64_t found, unsigned i, unsigned shift, uint64_t *word, uint64_t *bits, sum *s)
{
    unsigned last = (1u << shift) - 1;
    *word = (i & last ? *word : 0) | found << (i & last) * (64u >> shift);
    if ((i & last) != last)
        return;
    bits[i >> shift] = *word;
    s->any |= *word;
    s->all &= *word;
}

/* The part from a line on. */
INLINE dt_delta_part from_line(dt_delta_part p, size_t line)
{
    p.next_now = (line < AHEAD ? p.now + AHEAD * LINE : p.next_now - AHEAD * LINE) + line * LINE;
    p.next_mirror = (line < AHEAD ? p.mirror + AHEAD * LINE : p.next_mirror - AHEAD * LINE) + line * LINE;
    p.now += line * LINE;
    p.mirror += line * LINE;
    p.to += line * LINE;
    p.update = p.update ? p.update + line * LINE : NULL;
    return p;
}

/* The body of such a function: eight(part, shift, past, bits, sum) takes eight lines, one(part, shift) gives the bits of a
 * line that is left over. */
#define LINES(eight, one, shift, past)                                                              \
    do {                                                                                            \
        size_t line = 0;                                                                            \
        for (; line + 8 <= lines; line += 8)                                                        \
            eight(from_line(p, line), shift, past, bits + (line >> (shift)), &s);                   \
        for (; line < lines; line++) {                                                              \
            size_t within = line & ((1u << (shift)) - 1);                                           \
            uint64_t found = one(from_line(p, line), shift) << within * (64u >> (shift));           \
            bits[line >> (shift)] = within ? bits[line >> (shift)] | found : found;                 \
        }                                                                                           \
    } while (0)
/* One loop for each granule, past the caches and not. */
#define BY_SHIFT(eight, one)                       \
    sum s = {0, ~UINT64_C(0)};                     \
    switch (shift * 2 + p.past) {                  \
    case 0: LINES(eight, one, 0, false); break;    \
    case 1: LINES(eight, one, 0, true); break;     \
    case 2: LINES(eight, one, 1, false); break;    \
    case 3: LINES(eight, one, 1, true); break;     \
    case 4: LINES(eight, one, 2, false); break;    \
    case 5: LINES(eight, one, 2, true); break;     \
    case 6: LINES(eight, one, 3, false); break;    \
    default: LINES(eight, one, 3, true);           \
    }                                              \
    return s;

/* ---- by words, anywhere ---- */

typedef uint64_t __attribute__((aligned(1), may_alias)) any_word;

/* A bit for each lane of x that is not zero, from the low end. */
static inline uint64_t lanes(uint64_t x, unsigned shift)
{
    switch (shift) {
    case 0:
        x = ((x & UINT64_C(0x7F7F7F7F7F7F7F7F)) + UINT64_C(0x7F7F7F7F7F7F7F7F)) | x;
        x = x >> 7 & UINT64_C(0x0101010101010101);
        return x * UINT64_C(0x0102040810204080) >> 56;
    case 1:
        x = ((x & UINT64_C(0x7FFF7FFF7FFF7FFF)) + UINT64_C(0x7FFF7FFF7FFF7FFF)) | x;
        x = x >> 15 & UINT64_C(0x0001000100010001);
        return x * UINT64_C(0x0001000200040008) >> 48 & 15;
    case 2:
        return (uint64_t)((uint32_t)x != 0) | (uint64_t)(x >> 32 != 0) << 1;
    default:
        return x != 0;
    }
}

INLINE uint64_t words_one(dt_delta_part p, unsigned shift)
{
    uint64_t found = 0;
    for (unsigned i = 0; i < 8; i++) {
        uint64_t word = ((const volatile any_word *)p.now)[i]; /* volatile: once */
        found |= lanes(word ^ ((const any_word *)p.mirror)[i], shift) << i * (8 >> shift);
        ((any_word *)p.to)[i] = word;
        if (p.update)
            ((any_word *)p.update)[i] = word;
    }
    return found;
}

INLINE void words_eight(dt_delta_part p, unsigned shift, bool past, uint64_t *bits, sum *s)
{
    uint64_t word = 0;
    (void)past; /* there is no such store */
    for (unsigned i = 0; i < 8; i++)
        put(words_one(from_line(p, i), shift), i, shift, &word, bits, s);
}

static sum by_words(dt_delta_part p, uint32_t lines, unsigned shift, uint64_t *bits)
{
    BY_SHIFT(words_eight, words_one)
}

#if defined(__x86_64__)
#include <immintrin.h>

/* The compiler may not load it again. */
#define ONCE(vector) __asm__("" : "+v"(vector))
#define FETCH(p, i)                                                       \
    _mm_prefetch((const char *)(p).next_now + (i) * LINE, _MM_HINT_T1);   \
    _mm_prefetch((const char *)(p).next_mirror + (i) * LINE, _MM_HINT_T1)
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw")))

AVX2 INLINE uint64_t avx2_differ(__m256i low, __m256i high, const uint8_t *mirror, unsigned shift)
{
    __m256i x = _mm256_loadu_si256((const __m256i *)mirror), y = _mm256_loadu_si256((const __m256i *)(mirror + 32));
    if (shift == 0) {
        uint32_t a = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, x));
        uint32_t b = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, y));
        return ~((uint64_t)b << 32 | a);
    }
    if (shift == 1) {
        __m256i both = _mm256_packs_epi16(_mm256_cmpeq_epi16(low, x), _mm256_cmpeq_epi16(high, y));
        return (uint32_t)~_mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xD8)); /* packed by halves */
    }
    if (shift == 2) {
        int a = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(low, x)));
        int b = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(high, y)));
        return (uint16_t)~(b << 8 | a);
    }
    int a = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(low, x)));
    int b = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(high, y)));
    return (uint8_t)~(b << 4 | a);
}

AVX2 INLINE void avx2_put(uint8_t *to, __m256i low, __m256i high, bool past)
{
    if (past) {
        _mm256_stream_si256((__m256i *)to, low);
        _mm256_stream_si256((__m256i *)(to + 32), high);
    } else {
        _mm256_storeu_si256((__m256i *)to, low);
        _mm256_storeu_si256((__m256i *)(to + 32), high);
    }
}

AVX2 INLINE uint64_t avx2_one(dt_delta_part p, unsigned shift)
{
    __m256i low = _mm256_loadu_si256((const __m256i *)p.now);
    __m256i high = _mm256_loadu_si256((const __m256i *)(p.now + 32));
    ONCE(low);
    ONCE(high);
    uint64_t found = avx2_differ(low, high, p.mirror, shift);
    avx2_put(p.to, low, high, false);
    if (p.update)
        avx2_put(p.update, low, high, false);
    return found;
}

/* All loads before all stores: a load waits for a store before it whose address ends in the same 12 bits, and memory, mirror
 * and delta mostly begin near the beginnings of pages. */
AVX2 INLINE void avx2_eight(dt_delta_part p, unsigned shift, bool past, uint64_t *bits, sum *s)
{
    uint64_t word = 0;
    for (unsigned half = 0; half < 8; half += 4) { /* as many as there are registers for */
        __m256i low[4], high[4];
#define LOAD(i)                                                                    \
    FETCH(p, half + i);                                                            \
    low[i] = _mm256_loadu_si256((const __m256i *)(p.now + (half + i) * LINE));       \
    high[i] = _mm256_loadu_si256((const __m256i *)(p.now + (half + i) * LINE + 32)); \
    ONCE(low[i]);                                                                  \
    ONCE(high[i]);                                                                 \
    put(avx2_differ(low[i], high[i], p.mirror + (half + i) * LINE, shift), half + i, shift, &word, bits, s);
#define STORE(i) avx2_put(p.to + (half + i) * LINE, low[i], high[i], past);
#define UPDATE(i) avx2_put(p.update + (half + i) * LINE, low[i], high[i], false);
        LOAD(0) LOAD(1) LOAD(2) LOAD(3)
        STORE(0) STORE(1) STORE(2) STORE(3)
        if (p.update) {
            UPDATE(0) UPDATE(1) UPDATE(2) UPDATE(3)
        }
#undef LOAD
#undef STORE
#undef UPDATE
    }
}

AVX2 static sum by_avx2(dt_delta_part p, uint32_t lines, unsigned shift, uint64_t *bits)
{
    BY_SHIFT(avx2_eight, avx2_one)
}

AVX512 INLINE uint64_t avx512_differ(__m512i a, const uint8_t *mirror, unsigned shift)
{
    __m512i b = _mm512_loadu_si512(mirror);
    uint64_t found = shift == 0   ? _mm512_cmpneq_epi8_mask(a, b)
                     : shift == 1 ? _mm512_cmpneq_epi16_mask(a, b)
                     : shift == 2 ? _mm512_cmpneq_epi32_mask(a, b)
                                  : _mm512_cmpneq_epi64_mask(a, b);
    /* gcc 12 may keep a mask of a byte in memory and load eight: seen with -fsanitize=undefined. So it must not know that
     * what it cuts off here is zero. */
    __asm__("" : "+r"(found));
    return found & ~UINT64_C(0) >> (64 - (64 >> shift));
}

AVX512 INLINE uint64_t avx512_one(dt_delta_part p, unsigned shift)
{
    __m512i a = _mm512_loadu_si512(p.now);
    ONCE(a);
    uint64_t found = avx512_differ(a, p.mirror, shift);
    _mm512_storeu_si512(p.to, a);
    if (p.update)
        _mm512_storeu_si512(p.update, a);
    return found;
}

AVX512 INLINE void avx512_eight(dt_delta_part p, unsigned shift, bool past, uint64_t *bits, sum *s)
{
    uint64_t word = 0;
    __m512i now[8];
#define LOAD(i)                                        \
    FETCH(p, i);                                       \
    now[i] = _mm512_loadu_si512(p.now + (i) * LINE);   \
    ONCE(now[i]);                                      \
    put(avx512_differ(now[i], p.mirror + (i) * LINE, shift), i, shift, &word, bits, s);
#define STORE(i)                                                  \
    if (past)                                                     \
        _mm512_stream_si512((void *)(p.to + (i) * LINE), now[i]); \
    else                                                          \
        _mm512_storeu_si512(p.to + (i) * LINE, now[i]);
#define UPDATE(i) _mm512_storeu_si512(p.update + (i) * LINE, now[i]);
    EIGHT(LOAD)
    EIGHT(STORE)
    if (p.update) {
        EIGHT(UPDATE)
    }
#undef LOAD
#undef STORE
#undef UPDATE
}

AVX512 static sum by_avx512(dt_delta_part p, uint32_t lines, unsigned shift, uint64_t *bits)
{
    BY_SHIFT(avx512_eight, avx512_one)
}

static int has_avx512(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#endif

static int always(void) { return 1; }

static const struct {
    snapshot_lines *lines;
    int (*works)(void);
} ways[] = {
#if defined(__x86_64__)
    {by_avx512, has_avx512},
    {by_avx2, has_avx2},
#endif
    {by_words, always},
};

static _Atomic int chosen = -1;

unsigned dt_delta_ways(void) { return sizeof ways / sizeof *ways; }
int dt_delta_way_works(unsigned way) { return way < dt_delta_ways() && ways[way].works(); }
void dt_delta_use_way(int way) { atomic_store(&chosen, way); }

static snapshot_lines *best(void)
{
    int way = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (DT_UNLIKELY(way < 0)) {
        for (way = 0; !ways[way].works();)
            way++;
        atomic_store_explicit(&chosen, way, memory_order_relaxed);
    }
    return ways[way].lines;
}

/* Half as many bits, each set where one of two is. */
static void halve(uint64_t *mask, uint32_t words)
{
    for (uint32_t i = 0; i < words; i++) {
        uint64_t x = mask[i];
        x = (x | x >> 1) & UINT64_C(0x5555555555555555);
        x = (x | x >> 1) & UINT64_C(0x3333333333333333);
        x = (x | x >> 2) & UINT64_C(0x0F0F0F0F0F0F0F0F);
        x = (x | x >> 4) & UINT64_C(0x00FF00FF00FF00FF);
        x = (x | x >> 8) & UINT64_C(0x0000FFFF0000FFFF);
        x = (x | x >> 16) & UINT64_C(0x00000000FFFFFFFF);
        if (i & 1)
            mask[i / 2] |= x << 32;
        else
            mask[i / 2] = x;
    }
}

static bool is_full(const uint64_t *mask, uint32_t n)
{
    uint64_t all = ~UINT64_C(0);
    for (uint32_t i = 0; i < n / 64; i++)
        all &= mask[i];
    return !~all && (n % 64 == 0 || mask[n / 64] == ((uint64_t)1 << n % 64) - 1);
}

enum dt_delta_change dt_delta_snapshot(const dt_delta_part *part, uint32_t bytes, unsigned shift, uint64_t *mask)
{
    unsigned least = shift < 3 ? shift : 3, width = 64 >> least;
    uint32_t lines = bytes / LINE, rest = bytes % LINE, words = (lines + (rest != 0) + (1u << least) - 1) >> least;
    sum s = best()(*part, lines, least, mask);
    if (rest) {
        uint8_t ours[LINE] = {0}, theirs[LINE] = {0}, unused[LINE];
        uint64_t found = 0, before = lines & ((1u << least) - 1) ? mask[words - 1] : 0;
        memcpy(ours, part->now + lines * LINE, rest);
        memcpy(theirs, part->mirror + lines * LINE, rest);
        memcpy(part->to + lines * LINE, ours, rest);
        if (part->update)
            memcpy(part->update + lines * LINE, ours, rest);
        by_words((dt_delta_part){.now = ours, .mirror = theirs, .to = unused}, 1, least, &found);
        mask[words - 1] = before | found << (lines & ((1u << least) - 1)) * width;
    }
    bool odd = bytes % (8 * LINE);
    for (uint32_t i = 0; odd && i < words; i++)
        s.any |= mask[i];
    if (!s.any)
        return DELTA_SAME;
    for (unsigned i = least; i < shift; i++) {
        halve(mask, words);
        if (words & 1)
            mask[words / 2] &= UINT64_C(0xFFFFFFFF);
        words = (words + 1) / 2;
    }
    if (!odd && !~s.all)
        return DELTA_ALL;
    return (odd || shift > least) && is_full(mask, (bytes + (1u << shift) - 1) >> shift) ? DELTA_ALL : DELTA_SOME;
}

uint64_t dt_delta_stream_bytes = (uint64_t)16 << 20;

void dt_delta_stream_end(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

void dt_delta_mask_set(uint64_t *mask, uint32_t from, uint32_t to)
{
    if (from >= to)
        return;
    uint32_t word = from / 64, last = (to - 1) / 64;
    uint64_t low = ~UINT64_C(0) << (from & 63), high = ~UINT64_C(0) >> (63 - ((to - 1) & 63));
    if (word == last) {
        mask[word] |= low & high;
        return;
    }
    mask[word++] |= low;
    while (word < last)
        mask[word++] = ~UINT64_C(0);
    mask[last] |= high;
}
