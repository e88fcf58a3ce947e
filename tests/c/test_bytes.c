/* SPDX-License-Identifier: MIT
 * The bytes of a set: gathered, scattered, compared, copied to and fro where pages vanish beneath. */
#include "model.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void fill(uint8_t *p, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        p[i] = (uint8_t)random_below(256);
}

/* Sorted, disjoint extents over [0, total) bytes, as offsets; at most `most`. */
static uint64_t random_extents(uint64_t total, dt_extent *extents, uint64_t most)
{
    uint64_t n = 0, at = random_below(3) ? random_below(3 * page_bytes) : 0;
    while (n < most && at < total) {
        uint64_t nbytes = dt_min(random_below(2) ? random_below(9 * page_bytes) : random_below(200), total - at);
        extents[n++] = (dt_extent){.address = at, .nbytes = nbytes};
        at += nbytes + (random_below(2) ? 0 : random_below(2 * page_bytes));
    }
    return n;
}

static void bytes_rounds(int rounds)
{
    enum { MOST = 24 };
    uint64_t total = PAGES * page_bytes;
    uint8_t *memory = map_pages(PAGES), *packed = malloc(total), *want = malloc(total), *mirror = malloc(total);
    uint8_t *model_mirror = malloc(total);
    uint64_t past_from = dt_copy_past_from;
    for (int round = 0; round < rounds; round++) {
        dt_copy_past_from = round % 2 ? 0 : past_from; /* as in large memory */
        model m = random_model();
        dt_run runs[PAGES];
        uint64_t count = 0, n, expected = 0;
        for (unsigned i = 0; i < PAGES; i++)
            if (m.page[i])
                runs[count++] = (dt_run){(uintptr_t)memory + i * page_bytes, (uintptr_t)memory + (i + 1) * page_bytes};
        dt_set set = {0}, out = {0};
        dt_failure why = {0};
        CHECK(!dt_set_copy(runs, count, &set));
        dt_extent extents[MOST];
        n = random_extents(total, extents, MOST);
        fill(memory, total);
        fill(mirror, total);
        memcpy(model_mirror, mirror, total);
        bool unpinned = random_below(2);
        for (uint64_t k = 0; k < n; k++) {
            for (uint64_t i = extents[k].address; i < extents[k].address + extents[k].nbytes; i++)
                if (m.page[i / page_bytes])
                    want[expected++] = model_mirror[i] = memory[i];
            extents[k].mirror = mirror + extents[k].address;
            extents[k].address += (uintptr_t)memory;
            extents[k].unpinned = unpinned || !random_below(4);
        }
        CHECK(dt_set_nbytes(&set, extents, n) == expected);
        CHECK(!dt_gather(&set, extents, n, packed, expected, &why) && !memcmp(packed, want, expected));
        if (expected)
            CHECK(dt_gather(&set, extents, n, packed, expected - 1, &why) == DT_TOO_SMALL && why.code == DT_TOO_SMALL);
        uint64_t sums[MOST], at = 0;
        memset(packed, 0, total);
        CHECK(!dt_gather_summed(&set, extents, n, packed, expected, sums, &why) && !memcmp(packed, want, expected));
        for (uint64_t k = 0; k < n; k++) {
            uint64_t nbytes = dt_set_nbytes(&set, extents + k, 1);
            CHECK(sums[k] == dt_xxh64(want + at, nbytes, 0));
            at += nbytes;
        }
        if (expected)
            CHECK(dt_gather_summed(&set, extents, n, packed, expected - 1, sums, &why) == DT_TOO_SMALL);

        CHECK(!dt_changed(&set, extents, n, page_bytes, &out)); /* before the copy: nearly all differ */
        dt_set_clear(&out);
        for (uint64_t k = n; k > 1; k--) { /* copy_out takes extents in any order */
            uint64_t j = random_below(k);
            dt_extent swap = extents[k - 1];
            extents[k - 1] = extents[j];
            extents[j] = swap;
        }
        CHECK(!dt_copy_out(&set, extents, n, &why) && !memcmp(mirror, model_mirror, total));
        CHECK(!dt_changed(&set, extents, n, page_bytes, &out) && !out.count && out.runs);
        dt_set_clear(&out);

        /* A few bytes differ: in the set or beside it, in an extent or beside it. */
        model differs = {{0}};
        for (int k = 0; k < 12; k++)
            memory[random_below(total)] ^= 0x55;
        uint64_t granule = (1 + random_below(6)) * page_bytes;
        for (uint64_t k = 0; k < n; k++)
            for (uint64_t i = 0; i < extents[k].nbytes; i++) {
                uint64_t at = extents[k].address + i, page = (at - (uintptr_t)memory) / page_bytes;
                if (!m.page[page] || *(uint8_t *)(uintptr_t)at == ((uint8_t *)extents[k].mirror)[i])
                    continue;
                uint64_t first = at - at % granule;
                for (uint64_t p = 0; p < PAGES; p++) {
                    uint64_t a = (uintptr_t)memory + p * page_bytes;
                    differs.page[p] |= m.page[p] && a >= first && a < first + granule;
                }
            }
        set.epoch = 7;
        CHECK(!dt_changed(&set, extents, n, granule, &out) && out.epoch == 7 && out.complete == set.complete);
        model seen = {{0}};
        for (uint64_t i = 0; i < out.count; i++)
            for (uint64_t a = out.runs[i].start; a < out.runs[i].end; a += page_bytes)
                seen.page[(a - (uintptr_t)memory) / page_bytes]++;
        uint64_t pages = 0;
        for (unsigned p = 0; p < PAGES; p++)
            pages += differs.page[p];
        CHECK(!memcmp(&seen, &differs, sizeof seen) && out.pages == pages);
        dt_set_clear(&out);

        n = random_extents(total, extents, MOST);
        for (uint64_t k = 0; k < n; k++) {
            extents[k].address += (uintptr_t)memory;
            extents[k].unpinned = unpinned;
        }
        expected = dt_set_nbytes(&set, extents, n);
        fill(packed, expected);
        memcpy(want, memory, total);
        for (uint64_t k = 0, at = 0; k < n; k++)
            for (uint64_t i = 0; i < extents[k].nbytes; i++) {
                uint64_t offset = extents[k].address - (uintptr_t)memory + i;
                if (m.page[offset / page_bytes])
                    want[offset] = packed[at++];
            }
        CHECK(!dt_scatter(&set, extents, n, packed, expected, &why) && !memcmp(memory, want, total));
        CHECK(dt_scatter(&set, extents, n, packed, expected + 1, &why) == DT_TOO_SMALL);
        CHECK(!memcmp(memory, want, total));
        dt_set_clear(&set);
    }
    dt_copy_past_from = past_from;
    munmap(memory, total);
    free(packed);
    free(want);
    free(mirror);
    free(model_mirror);
}

static void test_bytes(void) { bytes_rounds(250); }

static void test_changed_borders(void)
{
    /* Two extents share a page: it is changed if it differs in either. Mirrors may overlap in address. */
    uint8_t *memory = map_pages(2), mirrors[2][64] = {{0}};
    uint64_t a = (uintptr_t)memory;
    dt_run run = {a, a + 2 * page_bytes};
    dt_set set = {0}, out = {0};
    CHECK(!dt_set_copy(&run, 1, &set));
    dt_extent extents[] = {{a + 100, 64, mirrors[0], 0, 0, NULL}, {a + 50, 64, mirrors[1], 0, 0, NULL}, {a + 10, 9, NULL, 0, 0, NULL}};
    memory[10] = 1; /* in no mirror */
    CHECK(!dt_changed(&set, extents, 3, page_bytes, &out) && out.count == 0);
    dt_set_clear(&out);
    memory[60] = 1; /* only in the second extent */
    CHECK(!dt_changed(&set, extents, 3, page_bytes, &out) && out.count == 1 && out.pages == 1 &&
          out.runs[0].start == a);
    dt_set_clear(&out);
    memory[110] = 1; /* in both */
    CHECK(!dt_copy_out(&set, extents, 3, NULL) && mirrors[0][10] == 1 && mirrors[1][10] == 1 && mirrors[1][60] == 1);
    CHECK(dt_changed(&set, extents, 3, 0, &out) == -EINVAL &&
          dt_changed(&set, extents, 3, page_bytes + 1, &out) == -EINVAL);
    dt_set_clear(&out);
    dt_set_clear(&set);
    munmap(memory, 2 * page_bytes);
}

/* Big runs go through the batches and the bounce buffer; one page is missing. */
static void vanished_rounds(void)
{
    enum { N = 700 };
    uint8_t *memory = map_pages(N), *buffer = malloc(N * page_bytes);
    uint64_t a = (uintptr_t)memory;
    for (int kind = 0; kind < 4; kind++) {
        dt_run runs[N];
        uint64_t count = 0;
        dt_set set = {0}, out = {0};
        if (kind & 1) {
            runs[count++] = (dt_run){a, a + N * page_bytes};
        } else {
            for (uint64_t i = 0; i < N; i += 2)
                runs[count++] = (dt_run){a + i * page_bytes, a + (i + 1) * page_bytes};
        }
        CHECK(!dt_set_copy(runs, count, &set));
        dt_extent extent = {a + 5, N * page_bytes - 12, buffer, 1, 0, NULL};
        uint64_t hole = kind & 2 ? 0 : 566, nbytes = dt_set_nbytes(&set, &extent, 1);
        fill(memory, N * page_bytes);
        dt_failure why = {0};
        CHECK(!dt_copy_out(&set, &extent, 1, &why));
        CHECK(!dt_changed(&set, &extent, 1, page_bytes, &out) && !out.count);
        dt_set_clear(&out);
        munmap(memory + hole * page_bytes, page_bytes);
        uint64_t start = dt_max(a + hole * page_bytes, a + 5), end = a + (hole + 1) * page_bytes;
        CHECK(dt_copy_out(&set, &extent, 1, &why) == -EFAULT);
        CHECK(why.code == -EFAULT && why.os_errno == EFAULT && why.step == DT_STEP_COPY && why.start == start &&
              why.end == end);
        memset(&why, 0, sizeof why);
        CHECK(dt_gather(&set, &extent, 1, buffer, nbytes, &why) == -EFAULT && why.start == start && why.end == end);
        memset(&why, 0, sizeof why);
        CHECK(dt_scatter(&set, &extent, 1, buffer, nbytes, &why) == -EFAULT && why.start == start && why.end == end);
        CHECK(dt_changed(&set, &extent, 1, page_bytes, &out) == -EFAULT && out.why.start == start &&
              out.why.end == end);
        CHECK(!out.block_);
        dt_set_clear(&set);
        if (mmap(memory + hole * page_bytes, page_bytes, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
                 -1, 0) == MAP_FAILED)
            abort();
    }
    munmap(memory, N * page_bytes);

    /* A file cut short beneath its mapping: SIGBUS for whoever touches it. */
    int fd = memfd_create("cut", MFD_CLOEXEC);
    CHECK(fd >= 0 && !ftruncate(fd, (off_t)(4 * page_bytes)));
    memory = mmap(NULL, 4 * page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    a = (uintptr_t)memory;
    memset(memory, 1, 4 * page_bytes);
    dt_run run = {a, a + 4 * page_bytes};
    dt_set set = {0};
    dt_failure why = {0};
    CHECK(!dt_set_copy(&run, 1, &set) && !ftruncate(fd, (off_t)(2 * page_bytes)));
    dt_extent extent = {a, 4 * page_bytes, NULL, 1, 0, NULL};
    CHECK(dt_gather(&set, &extent, 1, buffer, 4 * page_bytes, &why) == -EFAULT && why.start == a + 2 * page_bytes);
    extent.nbytes = 2 * page_bytes;
    CHECK(!dt_gather(&set, &extent, 1, buffer, 4 * page_bytes, &why) && !memcmp(buffer, memory, 2 * page_bytes));
    dt_set_clear(&set);
    munmap(memory, 4 * page_bytes);
    close(fd);
    free(buffer);
}

static void test_vanished(void) { vanished_rounds(); }

/* The same where a filter forbids process_vm_readv: in a child, since a filter stays. */
static void test_vanished_filtered(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (!child) {
        struct sock_filter code[] = {
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 1, 0),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_writev, 0, 1),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {sizeof code / sizeof *code, code};
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
            _exit(2);
        failed = 0;
        bytes_rounds(40);
        vanished_rounds();
        _exit(failed ? 1 : 0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 2); /* 2: no seccomp here */
}

static void test_copy_faults(void)
{
    uint8_t *memory = map_pages(4), mirror[3] = {0};
    uint64_t a = (uintptr_t)memory;
    dt_run run = {a, a + 4 * page_bytes};
    dt_set set = {0}, out = {0};
    dt_failure why = {0};
    CHECK(!dt_set_copy(&run, 1, &set));
    dt_extent extents[] = {{a, 1, mirror, 0, 0, NULL}, {a + page_bytes, 1, mirror + 1, 1, 0, NULL}, {a + 2 * page_bytes, 1,
        mirror + 2, 0, 0, NULL}};
    memory[0] = memory[page_bytes] = memory[2 * page_bytes] = 9;
    dt_fail(DT_SITE_COPY, 2, 1, EIO, 0);
    CHECK(dt_copy_out(&set, extents, 3, &why) == -EIO && why.os_errno == EIO && why.start == a + page_bytes);
    CHECK(mirror[0] == 9 && mirror[1] == 0 && mirror[2] == 0);
    dt_fail(DT_SITE_COPY, 2, 1, EIO, 1);
    CHECK(dt_copy_out(&set, extents, 3, &why) == -EIO && mirror[1] == 9 && mirror[2] == 0);
    dt_fail(DT_SITE_COPY, 3, 1, EFAULT, 0);
    CHECK(dt_changed(&set, extents, 3, page_bytes, &out) == -EFAULT && !out.block_);
    for (uint64_t call = 1; call <= 2; call++) {
        dt_fail(DT_SITE_ALLOCATE, call, 1, ENOMEM, 0);
        CHECK(dt_changed(&set, extents, 3, page_bytes, &out) == -ENOMEM && !out.block_);
    }
    dt_fail(0, 0, 0, 0, 0);
    dt_set_clear(&set);
    munmap(memory, 4 * page_bytes);
}

static _Atomic bool flipping;

static void *flip(void *byte)
{
    while (flipping)
        *(volatile uint8_t *)byte ^= 1;
    return NULL;
}

/* The last byte differs for ever, whatever somebody does to the first ones meanwhile: memcmp() calls some of these pages
 * equal. */
static void test_bytes_that_change_meanwhile(void)
{
    static _Alignas(64) uint8_t page[4096], copy[4096];
    pthread_t thread;
    uint64_t equal = 0;
    copy[4095] = 1;
    flipping = true;
    if (pthread_create(&thread, NULL, flip, page))
        abort();
    while (!*(volatile uint8_t *)page)
        ;
    for (int i = 0; i < 4000000; i++)
        equal += dt_same_bytes(page, copy, sizeof page);
    flipping = false;
    pthread_join(thread, NULL);
    CHECK(!equal);
    memcpy(copy, page, sizeof copy);
    for (uint64_t length = 0; length < 600; length++) {
        CHECK(dt_same_bytes(page + 1, copy + 1, length));
        page[length] ^= 1; /* the last of the bytes that are looked at */
        CHECK(length == 0 || !dt_same_bytes(page + 1, copy + 1, length));
        page[length] ^= 1;
    }
}

int main(void)
{
    page_bytes = dt_page_bytes();
    test_bytes();
    test_changed_borders();
    test_bytes_that_change_meanwhile();
    test_vanished();
    test_vanished_filtered();
    test_copy_faults();
    return outcome();
}
