/* SPDX-License-Identifier: MIT
 *
 * The other ways to keep a mirror of memory that is being written, each as one would write it by hand.
 *
 * Private anonymous memory of `nbytes` bytes, page-aligned, is written by one thread, which also collects. Each collect
 * copies what changed to the same offset of the mirror and makes ready for the next epoch. Functions return 0 or -errno.
 * Compiled by benchmarks/epoch.py; shares no code with dirtytrack.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY /* Linux 5.11 */
#define UFFD_USER_MODE_ONLY 1
#endif
#define SPINS 2000 /* reads of an empty descriptor before sleeping: a sleeping handler answers later than a page fault */
#define WHOLE_SHARE 64 /* from one run in so many pages on, protecting all at once takes less than run by run */

typedef int protect_function(uint8_t *start, uint64_t nbytes);

static uint8_t *memory;
static uint64_t nbytes, page_bytes, words;
static _Atomic uint64_t *written; /* a bit a page */

static int begin(uint8_t *where, uint64_t length, uint64_t page)
{
    memory = where;
    nbytes = length;
    page_bytes = page;
    words = (length / page + 63) / 64;
    written = calloc(words, sizeof *written);
    return written ? 0 : -ENOMEM;
}

static void end(void)
{
    free((void *)written);
    written = NULL;
}

/* The bit of the page at `address` is set. */
static uint8_t *note(const void *address)
{
    uint64_t page = (uint64_t)((const uint8_t *)address - memory) / page_bytes;
    atomic_fetch_or_explicit(&written[page / 64], UINT64_C(1) << (page % 64), memory_order_relaxed);
    return memory + page * page_bytes;
}

/* The next run of written pages at or after `*page`, as page numbers. */
static int next_run(uint64_t *page, uint64_t *first)
{
    uint64_t at = *page, count = nbytes / page_bytes;
    while (at < count && !(written[at / 64] >> (at % 64) & 1))
        at = written[at / 64] >> (at % 64) ? at + 1 : (at / 64 + 1) * 64;
    *first = at;
    while (at < count && written[at / 64] >> (at % 64) & 1)
        at++;
    *page = at;
    return *first < at;
}

/* Protects what was written, then copies it to the mirror. */
static int collect(protect_function *protect, uint8_t *mirror)
{
    uint64_t first, runs = 0;
    for (uint64_t page = 0; next_run(&page, &first);)
        runs++;
    int whole = runs * WHOLE_SHARE > nbytes / page_bytes;
    int code = whole ? protect(memory, nbytes) : 0;
    for (uint64_t page = 0; !code && next_run(&page, &first);) {
        uint64_t at = first * page_bytes, length = (page - first) * page_bytes;
        if (!whole)
            code = protect(memory + at, length);
        memcpy(mirror + at, memory + at, length);
    }
    memset((void *)written, 0, words * sizeof *written);
    return code;
}

/* ---- mprotect + SIGSEGV ---- */

static struct sigaction before;
static volatile sig_atomic_t failed; /* errno of mprotect in the handler; ENOMEM: vm.max_map_count */

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    uint8_t *address = info->si_addr;
    if (address < memory || address >= memory + nbytes) { /* not ours: it comes again, and ends the process */
        sigaction(SIGSEGV, &before, NULL);
        return;
    }
    int saved = errno;
    if (mprotect(note(address), page_bytes, PROT_READ | PROT_WRITE)) {
        failed = errno;
        mprotect(memory, nbytes, PROT_READ | PROT_WRITE); /* one mapping is always possible */
    }
    errno = saved;
}

static int deny(uint8_t *start, uint64_t length)
{
    return mprotect(start, length, PROT_READ) ? -errno : 0;
}

int mprotect_begin(uint8_t *where, uint64_t length, uint64_t page)
{
    int code = begin(where, length, page);
    if (code)
        return code;
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    failed = 0;
    return sigaction(SIGSEGV, &action, &before) ? -errno : deny(memory, nbytes);
}

int mprotect_collect(uint8_t *mirror)
{
    return failed ? -failed : collect(deny, mirror);
}

int mprotect_end(void)
{
    mprotect(memory, nbytes, PROT_READ | PROT_WRITE);
    sigaction(SIGSEGV, &before, NULL);
    end();
    return 0;
}

/* ---- synchronous userfaultfd: the writer waits until a thread has answered its fault ---- */

static int uffd, stop_pipe[2];
static pthread_t handler;

static int protect_mode(const uint8_t *start, uint64_t length, uint64_t mode)
{
    struct uffdio_writeprotect wp = {.range = {(uintptr_t)start, length}, .mode = mode};
    while (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
        if (errno != EAGAIN)
            return -errno;
    return 0;
}

static int protect(uint8_t *start, uint64_t length)
{
    return protect_mode(start, length, UFFDIO_WRITEPROTECT_MODE_WP);
}

static void *answer(void *unused)
{
    struct uffd_msg messages[16];
    struct pollfd wait[2] = {{.fd = uffd, .events = POLLIN}, {.fd = stop_pipe[0], .events = POLLIN}};
    for (unsigned idle = 0;;) {
        ssize_t got = read(uffd, messages, sizeof messages);
        if (got <= 0) {
            if (idle++ < SPINS)
                continue;
            idle = 0;
            if (poll(wait, 2, -1) > 0 && wait[1].revents)
                return unused;
            continue;
        }
        idle = 0;
        for (size_t i = 0; i < (size_t)got / sizeof *messages; i++)
            protect_mode(note((void *)(uintptr_t)messages[i].arg.pagefault.address), page_bytes, 0);
    }
}

int uffd_begin(uint8_t *where, uint64_t length, uint64_t page)
{
    int code = begin(where, length, page);
    if (code)
        return code;
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        return -errno;
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    struct uffdio_register enroll = {.range = {(uintptr_t)where, length}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &enroll) || pipe2(stop_pipe, O_CLOEXEC))
        return -errno;
    code = -pthread_create(&handler, NULL, answer, NULL);
    return code ? code : protect(memory, nbytes);
}

int uffd_collect(uint8_t *mirror)
{
    return collect(protect, mirror);
}

int uffd_end(void)
{
    protect_mode(memory, nbytes, 0);
    close(stop_pipe[1]);
    pthread_join(handler, NULL);
    close(stop_pipe[0]);
    close(uffd);
    end();
    return 0;
}

/* ---- without protection ---- */

int memcmp_collect(const uint8_t *from, uint64_t length, uint64_t page, uint8_t *mirror)
{
    for (uint64_t at = 0; at < length; at += page)
        if (memcmp(from + at, mirror + at, page))
            memcpy(mirror + at, from + at, page);
    return 0;
}

/* `known` has the hash of each page as it is in the mirror. */
int hash_collect(const uint8_t *from, uint64_t length, uint64_t page, uint8_t *mirror, uint64_t *known,
                  uint64_t (*hash)(const void *, size_t))
{
    for (uint64_t at = 0, i = 0; at < length; at += page, i++) {
        uint64_t now = hash(from + at, page);
        if (now == known[i])
            continue;
        known[i] = now;
        memcpy(mirror + at, from + at, page);
    }
    return 0;
}

/* Outside the time: 1 where the mirror has what the memory has. */
int equal(const uint8_t *from, uint64_t length, const uint8_t *mirror)
{
    return !memcmp(from, mirror, length);
}

int copy_collect(const uint8_t *from, uint64_t length, uint8_t *mirror)
{
    memcpy(mirror, from, length);
    return 0;
}

/* ---- fork: the child has the memory as it was, for as long as it lives ---- */

int fork_begin(int *child)
{
    pid_t pid = fork();
    if (pid == 0)
        for (;;)
            pause();
    *child = pid;
    return pid < 0 ? -errno : 0;
}

int fork_end(int child)
{
    return kill(child, SIGKILL) || waitpid(child, NULL, 0) < 0 ? -errno : 0;
}
