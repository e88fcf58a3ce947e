/* SPDX-License-Identifier: MIT
 * Packed runs: there and back against a plain loop; spans that are refused; XXH64 by its published values. */
#include "checking.h"
#include "digest.h"
#include <sys/mman.h>
#include <unistd.h>

enum { BYTES = 5000, MOST = 40 };

static uint64_t random_spans(dt_span *spans, uint64_t *sum)
{
    uint64_t n = 0, at = random_below(100);
    *sum = 0;
    while (n < MOST && at < BYTES) {
        uint64_t nbytes = dt_min(1 + random_below(random_below(2) ? 9 : 300), BYTES - at);
        spans[n++] = (dt_span){at, nbytes};
        *sum += nbytes;
        at += nbytes + random_below(2) * random_below(200);
    }
    return n;
}

static void test_there_and_back(void)
{
    static uint8_t memory[BYTES], other[BYTES], packed[BYTES + 1], want[BYTES], zeros[BYTES];
    for (int round = 0; round < 2000; round++) {
        dt_span spans[MOST];
        uint64_t sum, n = random_spans(spans, &sum), at = 0;
        dt_failure why = {0};
        for (unsigned i = 0; i < BYTES; i++)
            memory[i] = (uint8_t)random_below(256), want[i] = other[i] = (uint8_t)random_below(256);
        dt_extent from = {.address = (uintptr_t)memory, .nbytes = BYTES, .unpinned = round & 1};
        dt_extent to = {.address = (uintptr_t)other, .nbytes = BYTES, .unpinned = round & 1};
        packed[sum] = 0x5A;
        CHECK(dt_spans_nbytes(spans, n, BYTES) == sum);
        CHECK(!dt_pack(&from, spans, n, packed, sum, &why) && packed[sum] == 0x5A);
        for (uint64_t k = 0; k < n; k++, at += spans[k - 1].nbytes) {
            CHECK(!memcmp(packed + at, memory + spans[k].offset, spans[k].nbytes));
            memcpy(want + spans[k].offset, memory + spans[k].offset, spans[k].nbytes);
        }
        CHECK(dt_unpack(&to, spans, n, packed, sum + 1, &why) == DT_TOO_SMALL && why.code == DT_TOO_SMALL);
        CHECK(dt_pack(&from, spans, n, packed, sum - 1, &why) == DT_TOO_SMALL);
        CHECK(!dt_unpack(&to, spans, n, packed, sum, &why) && !memcmp(other, want, BYTES));
        for (uint64_t k = 0; k < n; k++)
            memset(want + spans[k].offset, 0, spans[k].nbytes);
        CHECK(!dt_unpack(&to, spans, n, NULL, sum, &why) && !memcmp(other, want, BYTES));
    }
    for (unsigned length = 0; length < 300; length++) {
        CHECK(dt_all_zero(zeros + 1, length));
        for (unsigned i = 0; i < length; i += 1 + length / 9) {
            zeros[1 + i] = 1;
            CHECK(!dt_all_zero(zeros + 1, length));
            zeros[1 + i] = 0;
        }
    }
}

static void test_refused(void)
{
    static uint8_t memory[BYTES], packed[BYTES];
    static const dt_span bad[][2] = {
        {{0, 0}, {8, 8}},                        /* empty */
        {{8, 8}, {15, 8}},                       /* overlapping */
        {{8, 8}, {0, 8}},                        /* out of order */
        {{0, 8}, {BYTES - 7, 8}},                /* beyond the end */
        {{0, 8}, {UINT64_MAX - 3, 8}},           /* around the end of all addresses */
        {{0, 8}, {8, UINT64_MAX}},
    };
    dt_extent extent = {.address = (uintptr_t)memory, .nbytes = BYTES};
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        dt_failure why = {0};
        memset(packed, 1, sizeof packed);
        CHECK(dt_spans_nbytes(bad[i], 2, BYTES) == UINT64_MAX);
        CHECK(dt_unpack(&extent, bad[i], 2, packed, 16, &why) == -EINVAL && why.code == -EINVAL && !memory[0]);
        CHECK(dt_unpack(&extent, bad[i], 2, NULL, UINT64_MAX, &why) == -EINVAL);
        CHECK(dt_pack(&extent, bad[i], 2, packed, 16, &why) == -EINVAL && packed[0] == 1);
    }
    CHECK(dt_spans_nbytes(NULL, 0, 0) == 0 && dt_spans_nbytes(&(dt_span){0, BYTES}, 1, BYTES) == BYTES);
}

static void test_vanished(void)
{
    uint8_t *memory = map_pages(3), data[8] = {0};
    munmap(memory + page_bytes, page_bytes);
    dt_extent extent = {.address = (uintptr_t)memory, .nbytes = 3 * page_bytes, .unpinned = 1};
    dt_span span = {page_bytes - 4, 8};
    dt_failure why = {0};
    CHECK(dt_pack(&extent, &span, 1, data, 8, &why) == -EFAULT && why.start == (uintptr_t)memory + page_bytes);
    CHECK(dt_unpack(&extent, &span, 1, data, 8, &why) == -EFAULT);
    CHECK(dt_unpack(&extent, &span, 1, NULL, 8, &why) == -EFAULT);
    munmap(memory, 3 * page_bytes);
}

static void test_xxh64(void)
{
    CHECK(dt_xxh64(NULL, 0, 0) == UINT64_C(0xEF46DB3751D8E999));
    CHECK(dt_xxh64((const uint8_t *)"a", 1, 0) == UINT64_C(0xD24EC4F1A98C6E5B));
    CHECK(dt_xxh64((const uint8_t *)"abc", 3, 0) == UINT64_C(0x44BC2CF5AD770999));
    const char *line = "Nobody inspects the spammish repetition";
    CHECK(dt_xxh64((const uint8_t *)line, strlen(line), 0) == UINT64_C(0xFBCEA83C8A378BF1));

    uint8_t data[300];
    for (unsigned i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * 37 + 11);
    for (uint64_t length = 0; length <= sizeof data; length++)
        for (uint64_t part = 32; part <= 128; part += 32) {
            dt_xxh64_parts parts;
            dt_xxh64_begin(&parts, 7);
            uint64_t at = 0;
            for (; length - at > part; at += part)
                dt_xxh64_add(&parts, data + at, part);
            CHECK(dt_xxh64_end(&parts, data + at, length - at) == dt_xxh64(data, length, 7));
        }
}

static void test_read_while_adding(void)
{
    enum { MOST_BYTES = 700 << 10 };
    static uint8_t data[MOST_BYTES], room[MOST_BYTES + 1];
    for (unsigned i = 0; i < MOST_BYTES; i++)
        data[i] = (uint8_t)random_below(256);
    int file = memfd_create("read", MFD_CLOEXEC), ends[2];
    CHECK(write(file, data, MOST_BYTES) == MOST_BYTES);
    for (int round = 0; round < 200; round++) {
        uint64_t at = random_below(MOST_BYTES), most = round & 1 ? MOST_BYTES : 2000;
        uint64_t length = random_below(dt_min(most, MOST_BYTES - at) + 1);
        dt_xxh64_parts parts;
        dt_xxh64_begin(&parts, 0);
        memset(room, 0x5A, sizeof room);
        CHECK(dt_read_adding(file, at, room, length, &parts) == (int64_t)length);
        CHECK(!memcmp(room, data + at, length) && room[length] == 0x5A);
        uint64_t whole = dt_down(length, 32);
        CHECK(dt_xxh64_end(&parts, room + whole, length - whole) == dt_xxh64(data + at, length, 0));
    }
    dt_xxh64_parts parts;
    dt_xxh64_begin(&parts, 0);
    CHECK(dt_read_adding(file, MOST_BYTES - 5, room, 100, &parts) == 5); /* where it ends */
    CHECK(dt_read_adding(file, 0, NULL, 100, &parts) == -EFAULT);
    CHECK(!pipe(ends) && dt_read_adding(ends[0], 0, room, 1, &parts) == -ESPIPE);
    close(ends[0]), close(ends[1]), close(file);
    CHECK(dt_read_adding(-1, 0, room, 1, &parts) == -EBADF);
}

int main(void)
{
    page_bytes = dt_page_bytes();
    test_there_and_back();
    test_refused();
    test_vanished();
    test_xxh64();
    test_read_while_adding();
    return outcome();
}
