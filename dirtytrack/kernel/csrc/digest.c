/* SPDX-License-Identifier: MIT
 *
 * The hash is NH, of UMAC (RFC 4418) and of Linux's NHPoly1305: the sum of products (m[2i] + k[2i]) * (m[2i+1] + k[2i+1])
 * of 32-bit words, as a number of 64 bits. Two pages that differ have the same sum for at most one key in 2^32, whatever
 * is in them; that is proven, and no assumption. A second sum under the same key, moved by 16 bytes, makes that 2^64
 * (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, CRYPTO '99, theorems 4.2 and 5.1). The key is random and as long as a
 * page, made for each session and never told, so that nobody can construct two pages that collide. */
#include "digest.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Bytes that are asked for in advance, since the hardware's own guess ends with the page. */
#define AHEAD 4096

/* ---- equal or not -------------------------------------------------------------------------------------------------- */

/* Not memcmp(): where that finds a difference it reads the bytes again to tell which is larger, and if somebody put them
 * back meanwhile it says "equal" of a page whose rest it never looked at. */
typedef uint64_t wide __attribute__((vector_size(64), aligned(1), may_alias));

static bool same_plain(const uint8_t *memory, const uint8_t *copy, uint64_t bytes, bool far)
{
    for (uint64_t at = 0; at < bytes; at += 256) {
        const wide *a = (const wide *)(memory + at), *b = (const wide *)(copy + at);
        for (int line = 0; far && line < 4; line++) {
            __builtin_prefetch(memory + at + AHEAD + 64 * line);
            __builtin_prefetch(copy + at + AHEAD + 64 * line);
        }
        wide differ = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]);
        if (DT_UNLIKELY(differ[0] | differ[1] | differ[2] | differ[3] | differ[4] | differ[5] | differ[6] | differ[7]))
            return false;
    }
    return true;
}

bool dt_is_zero(const uint8_t *memory, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += sizeof(wide)) {
        const wide *a = (const wide *)(memory + at);
        if ((*a)[0] | (*a)[1] | (*a)[2] | (*a)[3] | (*a)[4] | (*a)[5] | (*a)[6] | (*a)[7])
            return false;
    }
    return true;
}

/* ---- the digest ----------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
/* `out` is a constant where it is inlined: NULL copies nothing. */
static inline dt_digest sums_plain(const uint8_t *memory, uint64_t bytes, const uint8_t *key, uint8_t *out)
{
    __m128i a = _mm_setzero_si128(), b = a;
#pragma GCC unroll 4
    for (uint64_t at = 0; at < bytes; at += 16) {
        __m128i m = _mm_loadu_si128((const __m128i *)(memory + at));
        if (out)
            _mm_storeu_si128((__m128i *)(out + at), m);
        __m128i x = _mm_add_epi32(m, _mm_loadu_si128((const __m128i *)(key + at)));
        __m128i y = _mm_add_epi32(m, _mm_loadu_si128((const __m128i *)(key + at + DT_KEY_EXTRA)));
        a = _mm_add_epi64(a, _mm_mul_epu32(x, _mm_srli_epi64(x, 32)));
        b = _mm_add_epi64(b, _mm_mul_epu32(y, _mm_srli_epi64(y, 32)));
    }
    return (dt_digest){(uint64_t)_mm_cvtsi128_si64(a) + (uint64_t)_mm_cvtsi128_si64(_mm_unpackhi_epi64(a, a)),
                       (uint64_t)_mm_cvtsi128_si64(b) + (uint64_t)_mm_cvtsi128_si64(_mm_unpackhi_epi64(b, b))};
}

__attribute__((target("avx2"))) static uint64_t sum_of(__m256i v)
{
    return (uint64_t)_mm256_extract_epi64(v, 0) + (uint64_t)_mm256_extract_epi64(v, 1) +
           (uint64_t)_mm256_extract_epi64(v, 2) + (uint64_t)_mm256_extract_epi64(v, 3);
}

__attribute__((target("avx2"))) static inline dt_digest sums_avx2(const uint8_t *memory, uint64_t bytes,
                                                                         const uint8_t *key, uint8_t *out)
{
    __m256i first = _mm256_setzero_si256(), second = first;
#pragma GCC unroll 4
    for (uint64_t at = 0; at < bytes; at += 32) {
        __builtin_prefetch(memory + at + AHEAD);
        __m256i m = _mm256_loadu_si256((const __m256i *)(memory + at));
        if (out)
            _mm256_storeu_si256((__m256i *)(out + at), m);
        __m256i x = _mm256_add_epi32(m, _mm256_loadu_si256((const __m256i *)(key + at)));
        __m256i y = _mm256_add_epi32(m, _mm256_loadu_si256((const __m256i *)(key + at + DT_KEY_EXTRA)));
        first = _mm256_add_epi64(first, _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));
        second = _mm256_add_epi64(second, _mm256_mul_epu32(y, _mm256_srli_epi64(y, 32)));
    }
    return (dt_digest){sum_of(first), sum_of(second)};
}

__attribute__((target("avx2"))) static dt_digest digest_avx2(const uint8_t *memory, uint64_t bytes, const uint8_t *key)
{
    return sums_avx2(memory, bytes, key, NULL);
}

__attribute__((target("avx2"))) static dt_digest copy_avx2(const uint8_t *memory, uint64_t bytes, const uint8_t *key,
                                                           uint8_t *out)
{
    return sums_avx2(memory, bytes, key, out);
}

__attribute__((target("avx2"))) static inline __m256i differing(const uint8_t *memory, const uint8_t *copy)
{
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)memory), _mm256_loadu_si256((const __m256i *)copy));
}

__attribute__((target("avx2"))) static bool same_avx2(const uint8_t *memory, const uint8_t *copy, uint64_t bytes, bool far)
{
    for (uint64_t at = 0; at < bytes; at += 128) {
        const uint8_t *a = memory + at, *b = copy + at;
        if (far) {
            __builtin_prefetch(a + AHEAD), __builtin_prefetch(a + AHEAD + 64);
            __builtin_prefetch(b + AHEAD), __builtin_prefetch(b + AHEAD + 64);
        }
        __m256i differ = _mm256_or_si256(_mm256_or_si256(differing(a, b), differing(a + 32, b + 32)),
                                         _mm256_or_si256(differing(a + 64, b + 64), differing(a + 96, b + 96)));
        if (DT_UNLIKELY(!_mm256_testz_si256(differ, differ)))
            return false;
    }
    return true;
}

dt_same dt_choose_same(bool plain) { return !plain && __builtin_cpu_supports("avx2") ? same_avx2 : same_plain; }
#else
static inline dt_digest sums_plain(const uint8_t *memory, uint64_t bytes, const uint8_t *key, uint8_t *out)
{
    dt_digest sum = {0, 0};
    for (uint64_t at = 0; at < bytes; at += 8) {
        uint32_t m[2], k[2], moved[2];
        memcpy(m, memory + at, 8);
        if (out)
            memcpy(out + at, m, 8);
        memcpy(k, key + at, 8);
        memcpy(moved, key + at + DT_KEY_EXTRA, 8);
        sum.first += (uint64_t)(m[0] + k[0]) * (uint32_t)(m[1] + k[1]);
        sum.second += (uint64_t)(m[0] + moved[0]) * (uint32_t)(m[1] + moved[1]);
    }
    return sum;
}

dt_same dt_choose_same(bool plain) { (void)plain; return same_plain; }
#endif

static dt_digest digest_plain(const uint8_t *memory, uint64_t bytes, const uint8_t *key)
{
    return sums_plain(memory, bytes, key, NULL);
}

static dt_digest copy_plain(const uint8_t *memory, uint64_t bytes, const uint8_t *key, uint8_t *out)
{
    return sums_plain(memory, bytes, key, out);
}

#if defined(__x86_64__)
dt_digester dt_choose_digester(bool plain) { return !plain && __builtin_cpu_supports("avx2") ? digest_avx2 : digest_plain; }
dt_copier dt_choose_copier(bool plain) { return !plain && __builtin_cpu_supports("avx2") ? copy_avx2 : copy_plain; }
#else
dt_digester dt_choose_digester(bool plain) { (void)plain; return digest_plain; }
dt_copier dt_choose_copier(bool plain) { (void)plain; return copy_plain; }
#endif

bool dt_same_bytes(const uint8_t *memory, const uint8_t *copy, uint64_t bytes)
{
    static _Atomic(dt_same) chosen;
    dt_same same = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (DT_UNLIKELY(!same))
        atomic_store_explicit(&chosen, same = dt_choose_same(false), memory_order_relaxed);
    uint64_t most = dt_down(bytes, 256);
    if (!same(memory, copy, most, false))
        return false;
    uint8_t differ = 0;
    for (uint64_t i = most; i < bytes; i++)
        differ |= memory[i] ^ copy[i];
    return !differ;
}

void dt_digest_pages(const uint8_t *data, uint64_t count, uint64_t page_bytes, const uint8_t *key, uint64_t *out)
{
    dt_digester digest = dt_choose_digester(false);
    for (uint64_t i = 0; i < count; i++) {
        dt_digest found = digest(data + i * page_bytes, page_bytes, key);
        out[2 * i] = found.first;
        out[2 * i + 1] = found.second;
    }
}
