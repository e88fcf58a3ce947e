/* SPDX-License-Identifier: MIT
 * Frames of pages through a socket: whole, damaged, cut, and when nobody may write any more. */
#include "moving.h"
#include <pthread.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PAGES = 40, ROOM = 1 << 20, HEAD = 32 };

typedef struct side {
    dt_moving moving;
    uint64_t table[2 * (PAGES + 1)];
} side;

typedef struct receiver {
    side *to;
    dt_link link;
    dt_gate gate;
    dt_failure why;
    uint8_t *body, *data, first[HEAD];
    uint64_t body_bytes;
    int code;
} receiver;

static void set_up(side *s, uint8_t *bytes, uint64_t nbytes, uint64_t phase)
{
    s->moving = moving_over(bytes, nbytes, phase, s->table);
}

static void *receive(void *argument)
{
    receiver *r = argument;
    const dt_moving *memories[] = {&r->to->moving};
    r->code = dt_moving_receive(memories, 1, &r->link, r->body, r->data, r->first, &r->body_bytes, &r->gate, &r->why);
    return NULL;
}

static receiver new_receiver(side *to, int fd)
{
    return (receiver){.to = to, .link = {fd, 10000}, .body = malloc(ROOM), .data = malloc(ROOM)};
}

static void end_receiver(receiver *r)
{
    free(r->body);
    free(r->data);
    close(r->link.fd);
}

static void pair(int *both) { CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, both)); }

/* Of what the table tells, the memory has just that. */
static bool truthful(side *s)
{
    for (uint64_t i = 0; i < s->moving.pages; i++) {
        uint64_t known[2] = {s->table[2 * i], s->table[2 * i + 1]}, at;
        dt_failure why = {0};
        if ((known[0] || known[1]) && (dt_moving_digest(&s->moving, i, 1, 1, &at, &why) || at != i + 1))
            return false;
    }
    return true;
}

/* Some pages written, and the set of them. */
static void scribble(uint8_t *memory, uint64_t pages, dt_set *set)
{
    dt_run runs[PAGES + 1];
    uint64_t n = 0;
    bool long_runs = random_below(2);
    for (uint64_t p = 0; p < pages; p++) {
        if (long_runs ? p % 20 == 19 : random_below(2))
            continue;
        uint64_t low = (uintptr_t)memory + p * page_bytes;
        if (n && runs[n - 1].end == low)
            runs[n - 1].end += page_bytes;
        else
            runs[n++] = (dt_run){low, low + page_bytes};
        for (uint64_t i = 0; random_below(5) && i < page_bytes; i += 1 + random_below(500))
            memory[p * page_bytes + i] = (uint8_t)random_below(256);
    }
    CHECK(!dt_set_copy(runs, n, set));
}

static int send_set(side *from, const dt_set *set, int fd, uint64_t frame_pages, uint64_t *sent)
{
    dt_failure why = {0};
    dt_link link = {fd, 10000};
    uint8_t *body = malloc(32 * frame_pages), *data = malloc(frame_pages * page_bytes);
    uint64_t low = set->count ? set->runs[0].start : 0, high = set->count ? set->runs[set->count - 1].end : 0;
    dt_moved moved = {0};
    uint64_t looked, differing;
    CHECK(!dt_moving_differing(&from->moving, set, 1, &looked, &differing, &why));
    int rc = dt_moving_send(&from->moving, set, low, high, &link, 0, 7, frame_pages, body, data, sent, &moved, &why);
    CHECK(!rc && looked - differing == moved.same_pages && differing == moved.data_pages + moved.zero_pages);
    CHECK(!dt_moving_differing(&from->moving, set, 3, &looked, &differing, &why) && !differing);
    CHECK(looked == (moved.same_pages + moved.data_pages + moved.zero_pages + 2) / 3);
    free(body);
    free(data);
    return rc;
}

/* Two memories are alike when all has come, whatever their places in their pages. */
static void whole(int count)
{
    uint8_t *memory = map_pages(PAGES + 1), *copy = malloc((PAGES + 2) * page_bytes);
    for (int round = 0; round < count; round++) {
        uint64_t phase = random_below(2) ? random_below(page_bytes) : 0, nbytes = 1 + random_below(PAGES * page_bytes - 1);
        side from, to;
        memset(memory, 0, (PAGES + 1) * page_bytes);
        memset(copy, 0, (PAGES + 2) * page_bytes);
        set_up(&from, memory + phase, nbytes, phase);
        set_up(&to, copy, nbytes, phase);
        for (int again = 0; again < 3; again++) {
            dt_set set = {0};
            int both[2];
            uint64_t sent = 0;
            uint8_t last[HEAD] = "DTMF\x09";
            pthread_t thread;
            pair(both);
            receiver r = new_receiver(&to, both[1]);
            scribble(memory, from.moving.pages, &set);
            CHECK(!pthread_create(&thread, NULL, receive, &r));
            CHECK(!send_set(&from, &set, both[0], 1 + random_below(20), &sent));
            CHECK(send(both[0], last, sizeof last, 0) == HEAD);
            CHECK(!pthread_join(thread, NULL));
            CHECK(!r.code && !r.body_bytes && !memcmp(r.first, last, HEAD)); /* what is not ours is the caller's */
            CHECK(r.gate.received_bytes == sent + HEAD && !r.gate.inside);
            CHECK(!memcmp(memory + phase, copy, nbytes) && !memcmp(from.table, to.table, 16 * from.moving.pages));
            end_receiver(&r);
            close(both[0]);
            dt_set_clear(&set);
        }
    }
    munmap(memory, (PAGES + 1) * page_bytes);
    free(copy);
}

/* One bit of the stream is another, or it ends too soon: no table says of memory what it has not. */
static void damaged(int count)
{
    uint8_t *memory = map_pages(PAGES + 1), *copy = malloc(17 * page_bytes), *stream = malloc(ROOM);
    uint64_t refused = 0, handed = 0, ended = 0;
    for (int round = 0; round < count; round++) {
        side from, to;
        dt_set set = {0};
        int both[2];
        uint64_t sent = 0;
        memset(memory, 0, (PAGES + 1) * page_bytes);
        memset(copy, 0, 17 * page_bytes);
        set_up(&from, memory, 16 * page_bytes, 0);
        set_up(&to, copy, 16 * page_bytes, 0);
        scribble(memory, 16, &set);
        pair(both);
        CHECK(!send_set(&from, &set, both[0], 1 + random_below(16), &sent));
        CHECK(!sent || recv(both[1], stream, ROOM, MSG_WAITALL | MSG_DONTWAIT) == (ssize_t)sent);
        uint64_t length = random_below(2) ? sent : random_below(sent + 1), bit = random_below(8 * sent + 1);
        if (random_below(4) && bit < 8 * sent)
            stream[bit / 8] ^= (uint8_t)(1u << bit % 8);
        if (random_below(3) == 0 && sent) /* the bits of a header and its stretches, which are few */
            stream[random_below(dt_min(sent, 64))] ^= (uint8_t)(1u << random_below(8));
        CHECK(send(both[0], stream, length, 0) == (ssize_t)length);
        shutdown(both[0], SHUT_WR);
        receiver r = new_receiver(&to, both[1]);
        receive(&r);
        ended += r.code == -ENODATA;
        refused += r.code == DT_MALFORMED;
        handed += !r.code;
        CHECK(r.code == -ENODATA || r.code == DT_MALFORMED || !r.code);
        CHECK(!r.gate.inside && truthful(&to));
        end_receiver(&r);
        close(both[0]);
        dt_set_clear(&set);
    }
    CHECK(ended > (uint64_t)count / 10 && refused > (uint64_t)count / 10 && handed > (uint64_t)count / 10);
    munmap(memory, (PAGES + 1) * page_bytes);
    free(copy);
    free(stream);
}

/* Nobody writes behind a gate that is shut, and who does is counted. */
static void shut(void)
{
    uint8_t *memory = map_pages(PAGES + 1), *copy = calloc(17, page_bytes);
    side from, to;
    dt_set set = {0};
    int both[2];
    uint64_t sent = 0;
    set_up(&from, memory, 16 * page_bytes, 0);
    set_up(&to, copy, 16 * page_bytes, 0);
    memory[0] = memory[page_bytes] = 1;
    CHECK(!dt_set_copy(&(dt_run){(uintptr_t)memory, (uintptr_t)memory + 2 * page_bytes}, 1, &set));
    pair(both);
    receiver r = new_receiver(&to, both[1]);
    CHECK(!dt_gate_shut(&r.gate) && !dt_gate_enter(&r.gate) && !r.gate.inside);
    CHECK(!send_set(&from, &set, both[0], 16, &sent));
    receive(&r);
    CHECK(!r.code && r.body_bytes == 16 + 32 && r.first[4] == 8 && !copy[0] && !copy[page_bytes]);
    r.gate.shut = 0;
    CHECK(dt_gate_enter(&r.gate) && dt_gate_enter(&r.gate) && dt_gate_shut(&r.gate) == 2);
    dt_gate_leave(&r.gate);
    CHECK(dt_gate_shut(&r.gate) == 1);
    end_receiver(&r);
    close(both[0]);
    munmap(memory, (PAGES + 1) * page_bytes);
    free(copy);
    dt_set_clear(&set);
}

/* A peer that has gone, and one that takes nothing, or says nothing, for as long as is waited. */
static void gone(void)
{
    uint8_t *memory = map_pages(PAGES + 1);
    side from;
    dt_set set = {0};
    dt_failure why = {0};
    int both[2], rc;
    uint64_t sent = 0;
    dt_moved moved = {0};
    uint8_t *body = malloc(32 * PAGES), *data = malloc(PAGES * page_bytes);
    set_up(&from, memory, PAGES * page_bytes, 0);
    CHECK(!dt_set_copy(&(dt_run){(uintptr_t)memory, (uintptr_t)memory + PAGES * page_bytes}, 1, &set));
    pair(both);
    dt_link link = {both[0], 1};
    do {
        for (uint64_t i = 0; i < PAGES; i++)
            memory[i * page_bytes] ^= 1;
        rc = dt_moving_send(&from.moving, &set, set.runs[0].start, set.runs[0].end, &link, 0, 1, PAGES, body, data, &sent, &moved, &why);
    } while (!rc);
    CHECK(rc == -ETIMEDOUT && why.step == DT_STEP_SOCKET);
    close(both[1]);
    memory[0] ^= 1;
    rc = dt_moving_send(&from.moving, &set, set.runs[0].start, set.runs[0].end, &link, 0, 1, PAGES, body, data, &sent, &moved, &why);
    CHECK((rc == -EPIPE || rc == -ECONNRESET) && why.step == DT_STEP_SOCKET);
    close(both[0]);
    pair(both);
    receiver r = new_receiver(&from, both[1]);
    r.link.timeout_ms = 1;
    receive(&r);
    CHECK(r.code == -ETIMEDOUT && r.why.step == DT_STEP_SOCKET);
    end_receiver(&r);
    close(both[0]);
    munmap(memory, (PAGES + 1) * page_bytes);
    free(body);
    free(data);
    dt_set_clear(&set);
}

int main(void)
{
    page_bytes = dt_page_bytes();
    make_key();
    if (page_bytes == 4096) {
        whole(60);
        damaged(600);
        shut();
        gone();
    }
    return outcome();
}
