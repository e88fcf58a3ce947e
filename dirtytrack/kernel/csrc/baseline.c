/* SPDX-License-Identifier: MIT
 * The demo's rivals: stores to repeat, comparing with a copy, and mprotect with a SIGSEGV handler. */
#include "baseline.h"
#include "internal.h"
#include <signal.h>
#include <sys/mman.h>

int dt_baseline_replay(uint8_t *memory, uint64_t nbytes, const uint64_t *spans, uint64_t n, const uint8_t *data,
                       uint64_t length)
{
    uint64_t done = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t offset = spans[2 * i], bytes = spans[2 * i + 1];
        if (offset > nbytes || bytes > nbytes - offset || bytes > length - done)
            return -EINVAL;
        memcpy(memory + offset, data + done, bytes);
        done += bytes;
    }
    return 0;
}

void dt_baseline_compare(const uint8_t *memory, uint8_t *mirror, uint64_t nbytes, uint64_t *pages)
{
    uint64_t page = dt_page_bytes();
    for (uint64_t at = 0; at < nbytes; at += page) {
        uint64_t bytes = dt_min(page, nbytes - at);
        if (!memcmp(memory + at, mirror + at, bytes))
            continue;
        memcpy(mirror + at, memory + at, bytes);
        ++*pages;
    }
}

/* ---- mprotect + SIGSEGV ---- */

static atomic_flag taken = ATOMIC_FLAG_INIT;
static uint8_t *guarded;                /* set before the handler is, cleared after it is gone */
static uint64_t guarded_bytes;
static _Atomic uint64_t *written;       /* a bit a page */
static struct sigaction previous;

static uint64_t bitmap_words(void) { return ((guarded_bytes >> dt_page_shift()) + 63) / 64; }

static void on_fault(int signal_number, siginfo_t *info, void *context)
{
    uint8_t *address = info->si_addr;
    int saved = errno;
    if (info->si_code == SEGV_ACCERR && address >= guarded && address < guarded + guarded_bytes) {
        uint64_t page = (uint64_t)(address - guarded) >> dt_page_shift();
        /* Writable first, then the bit: a collect in between protects again and the store comes back here. */
        if (!mprotect(guarded + (page << dt_page_shift()), dt_page_bytes(), PROT_READ | PROT_WRITE)) {
            atomic_fetch_or(&written[page / 64], (uint64_t)1 << (page % 64));
            errno = saved;
            return;
        }
        /* max_map_count: each island of protection is a mapping. One writable range is always possible: all dirty. */
        if (!mprotect(guarded, guarded_bytes, PROT_READ | PROT_WRITE)) {
            for (uint64_t i = 0; i < bitmap_words(); i++)
                atomic_store(&written[i], UINT64_MAX);
            errno = saved;
            return;
        }
    }
    errno = saved;
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(signal_number, info, context);
    else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN)
        sigaction(SIGSEGV, &previous, NULL); /* the fault repeats, and now ends the process as it would have */
    else
        previous.sa_handler(signal_number);
}

int dt_baseline_protect(uint8_t *memory, uint64_t nbytes)
{
    uint64_t page = dt_page_bytes();
    if (!nbytes || ((uint64_t)(uintptr_t)memory | nbytes) & (page - 1))
        return -EINVAL;
    if (atomic_flag_test_and_set(&taken))
        return -EBUSY;
    guarded = memory;
    guarded_bytes = nbytes;
    written = dt_alloc(bitmap_words() * sizeof *written);
    if (!written) {
        atomic_flag_clear(&taken);
        return -ENOMEM;
    }
    struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGSEGV, &action, &previous) || mprotect(memory, nbytes, PROT_READ)) {
        int error = errno;
        dt_baseline_unprotect();
        return -error;
    }
    return 0;
}

int dt_baseline_collect(uint8_t *mirror, uint64_t *pages)
{
    uint64_t shift = dt_page_shift(), last = guarded_bytes >> shift, count = 0;
    if (!written)
        return -EINVAL;
    if (mprotect(guarded, guarded_bytes, PROT_READ))
        return -errno;
    for (uint64_t word = 0; word < bitmap_words(); word++) {
        uint64_t bits = atomic_exchange(&written[word], 0);
        while (bits) {
            uint64_t first = word * 64 + (uint64_t)__builtin_ctzll(bits);
            bits &= bits - 1;
            if (first >= last)
                break;
            uint64_t next = first + 1;
            for (; bits && next < last && word * 64 + (uint64_t)__builtin_ctzll(bits) == next; next++)
                bits &= bits - 1;
            memcpy(mirror + (first << shift), guarded + (first << shift), (next - first) << shift);
            count += next - first;
        }
    }
    *pages += count;
    return 0;
}

void dt_baseline_unprotect(void)
{
    if (!written)
        return;
    mprotect(guarded, guarded_bytes, PROT_READ | PROT_WRITE);
    sigaction(SIGSEGV, &previous, NULL);
    dt_free((void *)written);
    written = NULL;
    guarded = NULL;
    guarded_bytes = 0;
    atomic_flag_clear(&taken);
}
