/* SPDX-License-Identifier: MIT
 * Which granules of a block differ: a line of 64 bytes at a time, by what the processor has.
 *
 * The memory may be written while it is read. What is copied is what was compared: each byte is loaded once.
 *
 * Two streams are read and up to two are written, mostly out of memory and into it. What will be compared next is fetched
 * into the second-level cache meanwhile, which has room for more fetches at once than the first; and where a lot is
 * encoded, its bytes are written past the caches, line by line between the loads (measured, Zen 4: in one piece behind
 * them it takes half as long again). */
#include "delta.h"

enum { LINE = 64 };

/* Compares and copies `lines` lines. Of each line 64 >> shift bits go to `bits`; shift is 0 to 3. */
typedef void snapshot_lines(dt_delta_part part, uint8_t *copy, uint32_t lines, unsigned shift, uint8_t *bits);

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

static void by_words(dt_delta_part p, uint8_t *copy, uint32_t lines, unsigned shift, uint8_t *bits)
{
    unsigned width = 8 >> shift;
    for (uint32_t line = 0; line < lines; line++, p.now += LINE, p.mirror += LINE, copy += LINE) {
        uint64_t found = 0;
        for (unsigned i = 0; i < 8; i++) {
            uint64_t word = ((const volatile any_word *)p.now)[i]; /* volatile: once */
            found |= lanes(word ^ ((const any_word *)p.mirror)[i], shift) << i * width;
            ((any_word *)copy)[i] = word;
        }
        memcpy(bits, &found, width); /* little-endian */
        bits += width;
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

/* The compiler may not load it again. */
#define ONCE(vector) __asm__("" : "+v"(vector))
#define FETCH(part, line)                                                            \
    do {                                                                             \
        _mm_prefetch((const char *)(part).next_now + (line) * LINE, _MM_HINT_T1);    \
        _mm_prefetch((const char *)(part).next_mirror + (line) * LINE, _MM_HINT_T1); \
    } while (0)

__attribute__((target("avx2"))) static void by_avx2(dt_delta_part p, uint8_t *copy, uint32_t lines, unsigned shift,
                                                    uint8_t *bits)
{
    const uint8_t *now = p.now, *mirror = p.mirror, *from = copy + (-(uintptr_t)p.stream & 63);
    uint8_t *to = p.stream + (-(uintptr_t)p.stream & 63);
    for (uint32_t line = 0; line < lines; line++, now += LINE, mirror += LINE, copy += LINE) {
        FETCH(p, line);
        if (p.stream && line > DELTA_LAG) {
            _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
            _mm256_stream_si256((__m256i *)(to + 32), _mm256_loadu_si256((const __m256i *)(from + 32)));
            to += LINE;
            from += LINE;
        }
        __m256i low = _mm256_loadu_si256((const __m256i *)now), high = _mm256_loadu_si256((const __m256i *)(now + 32));
        ONCE(low);
        ONCE(high);
        __m256i x = _mm256_loadu_si256((const __m256i *)mirror), y = _mm256_loadu_si256((const __m256i *)(mirror + 32));
        _mm256_storeu_si256((__m256i *)copy, low);
        _mm256_storeu_si256((__m256i *)(copy + 32), high);
        uint32_t a, b;
        switch (shift) {
        case 0: {
            a = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, x));
            b = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, y));
            uint64_t found = ~((uint64_t)b << 32 | a);
            memcpy(bits, &found, 8);
            bits += 8;
            break;
        }
        case 1: {
            __m256i both = _mm256_packs_epi16(_mm256_cmpeq_epi16(low, x), _mm256_cmpeq_epi16(high, y));
            a = ~(uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(both, 0xD8)); /* the pack is by halves */
            memcpy(bits, &a, 4);
            bits += 4;
            break;
        }
        case 2:
            a = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(low, x)));
            b = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(high, y)));
            *bits++ = (uint8_t)~a;
            *bits++ = (uint8_t)~b;
            break;
        default:
            a = (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(low, x)));
            b = (uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(high, y)));
            *bits++ = (uint8_t)~(b << 4 | a);
        }
    }
}

__attribute__((target("avx512f,avx512bw"))) static void by_avx512(dt_delta_part p, uint8_t *copy, uint32_t lines,
                                                                  unsigned shift, uint8_t *bits)
{
    const uint8_t *now = p.now, *mirror = p.mirror, *from = copy + (-(uintptr_t)p.stream & 63);
    uint8_t *to = p.stream + (-(uintptr_t)p.stream & 63);
    for (uint32_t line = 0; line < lines; line++, now += LINE, mirror += LINE, copy += LINE) {
        FETCH(p, line);
        if (p.stream && line > DELTA_LAG) {
            _mm512_stream_si512((void *)to, _mm512_loadu_si512(from));
            to += LINE;
            from += LINE;
        }
        __m512i a = _mm512_loadu_si512(now);
        ONCE(a);
        __m512i b = _mm512_loadu_si512(mirror);
        _mm512_storeu_si512(copy, a);
        uint64_t found = shift == 0   ? _mm512_cmpneq_epi8_mask(a, b)
                         : shift == 1 ? _mm512_cmpneq_epi16_mask(a, b)
                         : shift == 2 ? _mm512_cmpneq_epi32_mask(a, b)
                                      : _mm512_cmpneq_epi64_mask(a, b);
        if (shift == 3)
            *bits = (uint8_t)found;
        else
            memcpy(bits, &found, 8); /* the next line overwrites what is too much; a mask has room for it */
        bits += 8 >> shift;
    }
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

bool dt_delta_snapshot(const dt_delta_part *part, uint8_t *copy, uint32_t bytes, unsigned shift, uint64_t *mask)
{
    unsigned least = shift < 3 ? shift : 3, width = 8 >> least;
    uint32_t lines = bytes / LINE, rest = bytes % LINE, words = (lines * width + (rest ? width : 0) + 7) / 8;
    uint64_t bits[DELTA_WORDS + 1]; /* one more: a line may write a word where it has fewer bits */
    snapshot_lines *compare = best();
    if (compare == by_words && !memcmp(part->now, part->mirror, bytes)) /* which is faster than that */
        return false;
    if (words)
        bits[words - 1] = 0;
    compare(*part, copy, lines, least, (uint8_t *)bits);
    if (rest) {
        uint8_t ours[LINE] = {0}, theirs[LINE] = {0}, unused[LINE];
        uint64_t found = 0;
        memcpy(ours, part->now + lines * LINE, rest);
        memcpy(theirs, part->mirror + lines * LINE, rest);
        memcpy(copy + lines * LINE, ours, rest);
        by_words((dt_delta_part){.now = ours, .mirror = theirs}, unused, 1, least, (uint8_t *)&found);
        memcpy((uint8_t *)bits + lines * width, &found, width);
    }
    uint32_t used = lines * width + (rest ? width : 0); /* bytes; what is beyond in the last word is no answer */
    if (used % 8)
        bits[words - 1] &= ((uint64_t)1 << used % 8 * 8) - 1;
    uint64_t any = 0;
    for (uint32_t i = 0; i < words; i++)
        any |= bits[i];
    if (!any)
        return false;
    for (unsigned i = least; i < shift; i++) {
        halve(bits, words);
        if (words & 1)
            bits[words / 2] &= UINT64_C(0xFFFFFFFF);
        words = (words + 1) / 2;
    }
    memcpy(mask, bits, words * sizeof *mask);
    return true;
}

uint64_t dt_delta_stream_bytes = (uint64_t)16 << 20;

bool dt_delta_streams(void) { return best() != by_words; }

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
