/* SPDX-License-Identifier: MIT
 * Frames of pages through a socket (docs/migration-protocol.md), one after the other: what is neither encrypted nor
 * compressed nor told by what differs needs no interpreter between them. */
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include "internal.h"

enum { HEAD_BYTES = 32, CHECKED_BYTES = 24, PAGES = 8, MOST_BYTES = 1 << 20, STRAIGHT_BYTES = 64 << 10, MOST_STRAIGHT = 16 };

/* As on the wire: little-endian, like every processor that this runs on. */
typedef struct head {
    uint8_t magic[4], kind, codec;
    uint16_t region;
    uint32_t body_bytes, data_bytes;
    uint64_t number, checksum;
} head;
_Static_assert(sizeof(head) == HEAD_BYTES && offsetof(head, checksum) == CHECKED_BYTES, "as documented");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire's numbers are little-endian");

static uint64_t checksum_of(const head *h, const uint8_t *body)
{
    return dt_xxh64(body, h->body_bytes, dt_xxh64((const uint8_t *)h, CHECKED_BYTES, 0));
}

static int broke(int number, dt_failure *why) { return dt_fail_with(why, -number, number, DT_STEP_SOCKET, 0, 0); }

/* Until the socket can go on, which does not block. */
static int wait_for(int fd, short what, int timeout_ms, dt_failure *why)
{
    struct pollfd poller = {.fd = fd, .events = what};
    int rc;
    while ((rc = poll(&poller, 1, timeout_ms)) < 0 && errno == EINTR)
        ;
    return rc > 0 ? 0 : broke(rc ? errno : ETIMEDOUT, why);
}

/* ---- out ---- */

static int send_all(const dt_link *link, struct iovec *parts, size_t count, dt_failure *why)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(link->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno != EINTR && errno != EAGAIN)
            return broke(errno, why);
        if (sent < 0 && errno == EAGAIN) {
            int rc = wait_for(link->fd, POLLOUT, link->timeout_ms, why);
            if (rc)
                return rc;
        }
        for (size_t left = sent < 0 ? 0 : (size_t)sent; message.msg_iovlen; message.msg_iov++, message.msg_iovlen--) {
            struct iovec *part = message.msg_iov;
            size_t taken = left < part->iov_len ? left : part->iov_len;
            part->iov_base = (uint8_t *)part->iov_base + taken;
            part->iov_len -= taken;
            left -= taken;
            if (part->iov_len)
                break;
        }
    }
    return 0;
}

int dt_moving_send(const dt_moving *m, const dt_set *set, uint64_t from, uint64_t to, const dt_link *link, uint32_t region,
                   uint64_t round, uint64_t frame_pages, uint8_t *body, uint8_t *data, uint64_t *sent_bytes, dt_moved *moved,
                   dt_failure *why)
{
    /* The digests are taken behind as many stretches as there may be, and moved up to as many as there are. */
    dt_stretch *stretches = (dt_stretch *)(void *)body;
    uint64_t *digests = (uint64_t *)(void *)(stretches + frame_pages);
    while (from < to) {
        uint64_t end = dt_min(dt_set_step(set, from, frame_pages), to);
        dt_moved now;
        int rc = dt_moving_take(m, set, from, end, stretches, digests, data, frame_pages, NULL, &now, why);
        if (rc)
            return rc;
        from = end;
        moved->same_pages += now.same_pages;
        if (!now.stretches)
            continue;
        memmove(stretches + now.stretches, digests, 16 * now.data_pages);
        head h = {.magic = "DTMF", .kind = PAGES, .region = (uint16_t)region, .number = round};
        h.body_bytes = (uint32_t)(sizeof(dt_stretch) * now.stretches + 16 * now.data_pages);
        h.data_bytes = (uint32_t)(m->page_bytes * now.data_pages);
        h.checksum = checksum_of(&h, body);
        struct iovec parts[] = {{&h, sizeof h}, {body, h.body_bytes}, {data, h.data_bytes}};
        rc = send_all(link, parts, h.data_bytes ? 3 : 2, why);
        if (rc)
            return rc;
        *sent_bytes += sizeof h + h.body_bytes + h.data_bytes;
        moved->stretches += now.stretches;
        moved->data_pages += now.data_pages;
        moved->zero_pages += now.zero_pages;
    }
    return 0;
}

/* ---- in ---- */

int dt_gate_enter(dt_gate *gate)
{
    __atomic_fetch_add(&gate->inside, 1, __ATOMIC_SEQ_CST);
    if (!__atomic_load_n(&gate->shut, __ATOMIC_SEQ_CST))
        return 1;
    dt_gate_leave(gate);
    return 0;
}

void dt_gate_leave(dt_gate *gate) { __atomic_fetch_sub(&gate->inside, 1, __ATOMIC_SEQ_CST); }

int dt_gate_shut(dt_gate *gate)
{
    __atomic_store_n(&gate->shut, 1, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&gate->inside, __ATOMIC_SEQ_CST);
}

static int receive_all(const dt_link *link, uint8_t *to, uint64_t nbytes, dt_gate *gate, dt_failure *why)
{
    while (nbytes) {
        ssize_t got = recv(link->fd, to, nbytes, MSG_DONTWAIT);
        if (!got)
            return broke(ENODATA, why);
        if (got < 0 && errno != EINTR && errno != EAGAIN)
            return broke(errno, why);
        if (got < 0 && errno == EAGAIN) {
            int rc = wait_for(link->fd, POLLIN, link->timeout_ms, why);
            if (rc)
                return rc;
        }
        if (got < 0)
            continue;
        to += got;
        nbytes -= (uint64_t)got;
        __atomic_fetch_add(&gate->received_bytes, (uint64_t)got, __ATOMIC_RELAXED);
    }
    return 0;
}

/* How many stretches and pages of data a body has: false where they do not fit each other. */
static bool parsed(const head *h, const uint8_t *body, uint64_t page_bytes, uint64_t *stretches, uint64_t *data_pages)
{
    uint64_t taken = 0, pages = 0;
    while (taken + 16 * pages < h->body_bytes && h->body_bytes - taken >= sizeof(dt_stretch)) {
        dt_stretch s;
        memcpy(&s, body + taken, sizeof s);
        taken += sizeof s;
        pages += s.kind == DT_STRETCH_DATA ? s.count : 0;
    }
    *stretches = taken / sizeof(dt_stretch);
    *data_pages = pages;
    return taken + 16 * pages == h->body_bytes && pages * page_bytes == h->data_bytes;
}

/* The data of a frame to where they belong: straight, where that takes few calls. */
static int take_in(const dt_moving *m, const dt_link *link, const uint8_t *body, uint64_t stretches, uint64_t data_pages,
                   uint8_t *data, dt_gate *gate, dt_failure *why)
{
    const dt_stretch *told = (const dt_stretch *)(const void *)body;
    const uint64_t *digests = (const uint64_t *)(const void *)(told + stretches);
    uint64_t places[MOST_STRAIGHT], nbytes = data_pages * m->page_bytes;
    int rc = DT_TOO_SMALL;
    if (stretches <= MOST_STRAIGHT && nbytes >= stretches * STRAIGHT_BYTES)
        rc = dt_moving_expect(m, told, stretches, places, why);
    if (rc == DT_TOO_SMALL) {
        rc = receive_all(link, data, nbytes, gate, why);
        return rc ? rc : dt_moving_put(m, told, stretches, digests, data, nbytes, why);
    }
    for (uint64_t i = 0; !rc && i < stretches; i++)
        if (places[i])
            /* SAFETY: dt_moving_expect() keeps to the memory, which the caller holds. */
            rc = receive_all(link, (uint8_t *)(uintptr_t)places[i], told[i].count * m->page_bytes, gate, why);
    return rc ? rc : dt_moving_put(m, told, stretches, digests, NULL, nbytes, why);
}

int dt_moving_receive(const dt_moving *const *memories, uint64_t n, const dt_link *link, uint8_t *body, uint8_t *data,
                      uint8_t *first, uint64_t *body_bytes, dt_gate *gate, dt_failure *why)
{
    for (;;) {
        head h;
        uint64_t stretches, data_pages;
        *body_bytes = 0;
        int rc = receive_all(link, first, sizeof h, gate, why);
        if (rc)
            return rc;
        memcpy(&h, first, sizeof h);
        if (memcmp(h.magic, "DTMF", 4) || h.kind != PAGES || h.codec || h.region >= n || !h.body_bytes ||
            h.body_bytes > MOST_BYTES || h.data_bytes > MOST_BYTES)
            return 0;
        rc = receive_all(link, body, h.body_bytes, gate, why);
        if (rc)
            return rc;
        *body_bytes = h.body_bytes;
        const dt_moving *m = memories[h.region];
        if (checksum_of(&h, body) != h.checksum || !parsed(&h, body, m->page_bytes, &stretches, &data_pages) ||
            !dt_gate_enter(gate))
            return 0;
        rc = take_in(m, link, body, stretches, data_pages, data, gate, why);
        dt_gate_leave(gate);
        if (rc)
            return rc;
    }
}
