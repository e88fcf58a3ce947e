/* SPDX-License-Identifier: MIT
 * Finding words by vectors of them: the best way that this processor has, chosen when it is first needed.
 *
 * Almost no word of a heap is one that is looked for, so a line of 64 bytes is asked about as one, and only where the answer
 * is yes it is asked which. Each word is loaded once: other threads may be writing it. */
#include "words.h"

enum { LINE = 64, AHEAD = 1024 };
#define ARGUMENTS \
    const uint8_t *from, const uint8_t *next, uint64_t words, dt_needle n, uint64_t base, uint64_t *out
/* What is read AHEAD bytes later, in this piece of so many bytes or in the next. Nearer than delta.c fetches: this reads one
 * stream and writes none, and all that is fetched stays in the first-level cache (measured, Sapphire Rapids). */
#define FETCH(offset, bytes)                                                                                   \
    __builtin_prefetch((offset) + AHEAD < (bytes) ? from + (offset) + AHEAD : next + ((offset) + AHEAD - (bytes)))
#define INLINE static inline __attribute__((always_inline))

typedef uint64_t __attribute__((aligned(1), may_alias)) word64; /* a copy may lie anywhere; the memory itself is aligned */
typedef uint32_t __attribute__((aligned(1), may_alias)) word32;

INLINE uint64_t *put(uint64_t *out, uint64_t bits, uint64_t base, unsigned shift)
{
    for (; bits; bits &= bits - 1)
        *out++ = base + ((uint64_t)__builtin_ctzll(bits) << shift);
    return out;
}

INLINE bool wide_bit(uint64_t word, const dt_needle *n)
{
    return (word & n->keep) - n->low < n->span && (word & n->mask) == n->tag; /* the first is hardly ever so */
}

INLINE bool narrow_bit(uint32_t word, const dt_needle *n)
{
    return (uint32_t)(word - (uint32_t)n->low) < (uint32_t)n->span;
}

/* ---- word by word ---- */

#define WORD_BY_WORD(type, bit, shift)                                           \
    uint64_t *end = out, lines = words >> (6 - (shift)), each = 64 >> (shift);   \
    const volatile type *w = (const volatile type *)from;                        \
    for (uint64_t line = 0; line < lines; line++, w += each) {                   \
        FETCH(line * LINE, lines * LINE);                                        \
        for (uint64_t k = 0; k < each; k++)                                      \
            if (DT_UNLIKELY(bit(w[k], &n)))                                      \
                *end++ = base + line * LINE + (k << (shift));                    \
    }                                                                            \
    for (uint64_t k = 0; k < words - lines * each; k++)                          \
        if (bit(w[k], &n))                                                       \
            *end++ = base + lines * LINE + (k << (shift));                       \
    return (uint64_t)(end - out);

static uint64_t plain_wide(ARGUMENTS) { WORD_BY_WORD(word64, wide_bit, 3) }
static uint64_t plain_narrow(ARGUMENTS) { WORD_BY_WORD(word32, narrow_bit, 2) }

/* ---- by vectors ---- */

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))

/* There is no unsigned comparison: both sides have their highest bit turned. */
typedef struct wide_avx2 { __m256i keep, low, span, mask, tag; } wide_avx2;

AVX2 INLINE __m256i avx2_wide(const uint8_t *at, const wide_avx2 *c)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)at);
    __asm__("" : "+x"(v)); /* loaded once */
    __m256i within = _mm256_cmpgt_epi64(c->span, _mm256_sub_epi64(_mm256_and_si256(v, c->keep), c->low));
    return _mm256_and_si256(within, _mm256_cmpeq_epi64(_mm256_and_si256(v, c->mask), c->tag));
}

AVX2 static uint64_t avx2_wide_words(ARGUMENTS)
{
    uint64_t *end = out, i = 0, high = UINT64_C(1) << 63;
    wide_avx2 c = {_mm256_set1_epi64x((int64_t)n.keep), _mm256_set1_epi64x((int64_t)(n.low + high)),
                   _mm256_set1_epi64x((int64_t)(n.span + high)), _mm256_set1_epi64x((int64_t)n.mask),
                   _mm256_set1_epi64x((int64_t)n.tag)};
    for (; i + 16 <= words; i += 16) {
        const uint8_t *at = from + i * 8;
        FETCH(i * 8, words * 8);
        FETCH(i * 8 + LINE, words * 8);
        __m256i a = avx2_wide(at, &c), b = avx2_wide(at + 32, &c);
        __m256i d = avx2_wide(at + LINE, &c), e = avx2_wide(at + LINE + 32, &c);
        __m256i any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(d, e));
        if (DT_LIKELY(_mm256_testz_si256(any, any)))
            continue;
        uint64_t bits = (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(a));
        bits |= (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(b)) << 4;
        bits |= (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(d)) << 8;
        bits |= (uint64_t)_mm256_movemask_pd(_mm256_castsi256_pd(e)) << 12;
        end = put(end, bits, base + i * 8, 3);
    }
    end += plain_wide(from + i * 8, next + i * 8, words - i, n, base + i * 8, end);
    return (uint64_t)(end - out);
}

AVX2 INLINE __m256i avx2_narrow(const uint8_t *at, __m256i low, __m256i span)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)at);
    __asm__("" : "+x"(v));
    return _mm256_cmpgt_epi32(span, _mm256_sub_epi32(v, low));
}

AVX2 static uint64_t avx2_narrow_words(ARGUMENTS)
{
    uint64_t *end = out, i = 0;
    uint32_t high = UINT32_C(1) << 31;
    __m256i low = _mm256_set1_epi32((int32_t)((uint32_t)n.low + high));
    __m256i span = _mm256_set1_epi32((int32_t)((uint32_t)n.span + high));
    for (; i + 32 <= words; i += 32) {
        const uint8_t *at = from + i * 4;
        FETCH(i * 4, words * 4);
        FETCH(i * 4 + LINE, words * 4);
        __m256i a = avx2_narrow(at, low, span), b = avx2_narrow(at + 32, low, span);
        __m256i d = avx2_narrow(at + LINE, low, span), e = avx2_narrow(at + LINE + 32, low, span);
        __m256i any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(d, e));
        if (DT_LIKELY(_mm256_testz_si256(any, any)))
            continue;
        uint64_t bits = (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(a));
        bits |= (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(b)) << 8;
        bits |= (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(d)) << 16;
        bits |= (uint64_t)_mm256_movemask_ps(_mm256_castsi256_ps(e)) << 24;
        end = put(end, bits, base + i * 4, 2);
    }
    end += plain_narrow(from + i * 4, next + i * 4, words - i, n, base + i * 4, end);
    return (uint64_t)(end - out);
}

typedef struct wide_avx512 { __m512i keep, low, span, mask, tag; } wide_avx512;

AVX512 INLINE uint64_t avx512_wide(const uint8_t *at, const wide_avx512 *c)
{
    __m512i v = _mm512_loadu_si512(at);
    __asm__("" : "+v"(v));
    __mmask8 tagged = _mm512_cmpeq_epi64_mask(_mm512_and_si512(v, c->mask), c->tag);
    uint64_t found = _mm512_mask_cmplt_epu64_mask(tagged, _mm512_sub_epi64(_mm512_and_si512(v, c->keep), c->low), c->span);
    __asm__("" : "+r"(found)); /* gcc 12 may keep a mask of a byte in memory and load eight: see delta_mask.c */
    return found & 0xFF;
}

AVX512 static uint64_t avx512_wide_words(ARGUMENTS)
{
    uint64_t *end = out, i = 0;
    wide_avx512 c = {_mm512_set1_epi64((int64_t)n.keep), _mm512_set1_epi64((int64_t)n.low),
                     _mm512_set1_epi64((int64_t)n.span), _mm512_set1_epi64((int64_t)n.mask),
                     _mm512_set1_epi64((int64_t)n.tag)};
    for (; i + 32 <= words; i += 32) {
        const uint8_t *at = from + i * 8;
        FETCH(i * 8, words * 8);
        FETCH(i * 8 + LINE, words * 8);
        FETCH(i * 8 + 2 * LINE, words * 8);
        FETCH(i * 8 + 3 * LINE, words * 8);
        uint64_t bits = avx512_wide(at, &c) | avx512_wide(at + LINE, &c) << 8 | avx512_wide(at + 2 * LINE, &c) << 16 |
                        avx512_wide(at + 3 * LINE, &c) << 24;
        if (DT_UNLIKELY(bits))
            end = put(end, bits, base + i * 8, 3);
    }
    end += plain_wide(from + i * 8, next + i * 8, words - i, n, base + i * 8, end);
    return (uint64_t)(end - out);
}

AVX512 INLINE uint64_t avx512_narrow(const uint8_t *at, __m512i low, __m512i span)
{
    __m512i v = _mm512_loadu_si512(at);
    __asm__("" : "+v"(v));
    return _mm512_cmplt_epu32_mask(_mm512_sub_epi32(v, low), span);
}

AVX512 static uint64_t avx512_narrow_words(ARGUMENTS)
{
    uint64_t *end = out, i = 0;
    __m512i low = _mm512_set1_epi32((int32_t)(uint32_t)n.low), span = _mm512_set1_epi32((int32_t)(uint32_t)n.span);
    for (; i + 64 <= words; i += 64) {
        const uint8_t *at = from + i * 4;
        FETCH(i * 4, words * 4);
        FETCH(i * 4 + LINE, words * 4);
        FETCH(i * 4 + 2 * LINE, words * 4);
        FETCH(i * 4 + 3 * LINE, words * 4);
        uint64_t bits = avx512_narrow(at, low, span) | avx512_narrow(at + LINE, low, span) << 16 |
                        avx512_narrow(at + 2 * LINE, low, span) << 32 | avx512_narrow(at + 3 * LINE, low, span) << 48;
        if (DT_UNLIKELY(bits))
            end = put(end, bits, base + i * 4, 2);
    }
    end += plain_narrow(from + i * 4, next + i * 4, words - i, n, base + i * 4, end);
    return (uint64_t)(end - out);
}

static int has_avx512(void) { return __builtin_cpu_supports("avx512f"); }
static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#endif

static int always(void) { return 1; }

static const struct {
    dt_scan_words *wide, *narrow;
    int (*works)(void);
} ways[] = {
#if defined(__x86_64__)
    {avx512_wide_words, avx512_narrow_words, has_avx512},
    {avx2_wide_words, avx2_narrow_words, has_avx2},
#endif
    {plain_wide, plain_narrow, always},
};

static _Atomic int chosen = -1;

unsigned dt_words_ways(void) { return sizeof ways / sizeof *ways; }
int dt_words_way_works(unsigned way) { return way < dt_words_ways() && ways[way].works(); }
void dt_words_use_way(int way) { atomic_store(&chosen, way); }

dt_scan_words *dt_words_scanner(bool narrow)
{
    int way = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (DT_UNLIKELY(way < 0)) {
        for (way = 0; !ways[way].works();)
            way++;
        atomic_store_explicit(&chosen, way, memory_order_relaxed);
    }
    return narrow ? ways[way].narrow : ways[way].wide;
}
