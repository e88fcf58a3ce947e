/* SPDX-License-Identifier: MIT
 * A program that is attached to, and finds out by itself whether it came to harm: threads that wait in many system calls,
 * none of which may fail or come back too early (with a second argument they may, with EINTR), and threads that compute
 * with all kinds of registers. The first argument is the number of threads. It prints "up",
 * then how far it came for each line on its standard input; anything wrong is told and ends it with status 9. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 256, PAGE = 4096 };
static _Atomic uint64_t rounds[16];
static _Atomic unsigned signals;
static int lenient; /* a wait may end early, with EINTR, as after SIGSTOP and SIGCONT */

static void wrong(const char *what)
{
    fprintf(stderr, "wrong: %s: %s\n", what, strerror(errno));
    _exit(9);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Words that are all written with one number, and sums in floating point that are known. */
static void *compute(void *which)
{
    uintptr_t k = (uintptr_t)which;
    uint64_t *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), counts[PAGES] = {0};
    uint64_t x = k * 0x9e3779b97f4a7c15u + 1;
    for (;;) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        uint64_t page = x % PAGES, *at = memory + page * (PAGE / 8);
        if (*at != counts[page])
            wrong("a word has another number than was stored");
        *at = ++counts[page];
        double sum = 0, a = (double)(x & 0xff), b = 1.5, c = 0.25;
        for (int i = 0; i < 100; i++)
            sum += a * b + c, a += 1;
        if (sum != 100 * ((double)(x & 0xff) * 1.5 + 0.25) + 1.5 * 4950)
            wrong("a sum in floating point is another");
        rounds[k]++;
    }
    return NULL;
}

static void *sleep_(void *which)
{
    for (;;) {
        struct timespec t = {0, 3000000};
        double begun = now();
        int rc = nanosleep(&t, NULL);
        if (rc && !(lenient && errno == EINTR))
            wrong("nanosleep");
        if (!rc && now() - begun < 0.0029)
            wrong("nanosleep was too short");
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

static void *wait_in_poll(void *which)
{
    int ends[2];
    if (pipe(ends))
        wrong("pipe");
    for (;;) {
        struct pollfd p = {.fd = ends[0], .events = POLLIN};
        double begun = now();
        int n = poll(&p, 1, 4);
        if ((n || now() - begun < 0.0039) && !(lenient && n < 0 && errno == EINTR))
            wrong("poll");
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

static void *wait_in_epoll(void *which)
{
    int fd = epoll_create1(EPOLL_CLOEXEC);
    for (;;) {
        struct epoll_event event;
        int n = epoll_wait(fd, &event, 1, 5);
        if (n && !(lenient && n < 0 && errno == EINTR))
            wrong("epoll_wait");
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

static void *wait_in_futex(void *which)
{
    _Atomic uint32_t word = 7;
    for (;;) {
        struct timespec t = {0, 5000000};
        if (syscall(SYS_futex, &word, FUTEX_WAIT, 7, &t, NULL, 0) != -1 || (errno != ETIMEDOUT && !(lenient && errno == EINTR)))
            wrong("futex");
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

static int to_reader[2];
static void *read_(void *which)
{
    for (;;) {
        char byte;
        if (read(to_reader[0], &byte, 1) != 1 || byte != 'x')
            wrong("read");
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

static void *write_(void *which)
{
    for (;;) {
        usleep(2000);
        if (write(to_reader[1], "x", 1) != 1)
            wrong("write");
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

/* Calls on sockets with a time-out. Each must take it, and say so. */
static const struct timeval five = {0, 5000};

static void timed_out(const char *call, ssize_t n, void *which)
{
    if (n != -1 || (errno != EAGAIN && !(lenient && errno == EINTR)))
        wrong(call);
    rounds[(uintptr_t)which]++;
}

static void *wait_in_readv(void *which)
{
    int ends[2];
    char byte;
    struct iovec to = {&byte, 1};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) || setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &five, sizeof five))
        wrong("socketpair");
    for (;;)
        timed_out("readv", readv(ends[0], &to, 1), which);
    return NULL;
}

static int full_socket(void)
{
    int ends[2];
    static char some[4096];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) || setsockopt(ends[0], SOL_SOCKET, SO_SNDTIMEO, &five, sizeof five))
        wrong("socketpair");
    while (send(ends[0], some, sizeof some, MSG_DONTWAIT) > 0)
        ;
    return ends[0];
}

static void *wait_in_write(void *which)
{
    static char some[4096];
    for (int fd = full_socket();;)
        timed_out("write", write(fd, some, sizeof some), which);
    return NULL;
}

static void *wait_in_send(void *which)
{
    static char some[4096];
    for (int fd = full_socket();;)
        timed_out("send", send(fd, some, sizeof some, 0), which);
    return NULL;
}

static void *wait_in_connect(void *which)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    socklen_t bytes = sizeof name;
    int server = socket(AF_UNIX, SOCK_STREAM, 0), first = socket(AF_UNIX, SOCK_STREAM, 0), fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(server, (void *)&name, sizeof(sa_family_t)) || listen(server, 0) || getsockname(server, (void *)&name, &bytes) ||
        connect(first, (void *)&name, bytes) || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &five, sizeof five))
        wrong("listen");
    for (;;)
        timed_out("connect", connect(fd, (void *)&name, bytes), which);
    return NULL;
}

/* The end of each is a signal, which the process does not ask for. */
static void *have_children(void *which)
{
    for (;;) {
        pid_t child = fork();
        if (!child) {
            usleep(3000);
            _exit(3);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child || WEXITSTATUS(status) != 3)
            wrong("waitpid");
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

static void on_signal(int number) { signals += number == SIGUSR1; }

/* Signals that arrive are handled, each once. */
static void *be_signalled(void *which)
{
    for (;;) {
        unsigned before = signals;
        if (syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1))
            wrong("tgkill");
        if (signals != before + 1)
            wrong("a signal was not handled once");
        usleep(500);
        rounds[(uintptr_t)which]++;
    }
    return NULL;
}

int main(int count, char **arguments)
{
    void *(*const bodies[])(void *) = {compute, compute, sleep_, wait_in_poll, wait_in_epoll, wait_in_futex, read_, write_,
                                       be_signalled, wait_in_readv, wait_in_write, wait_in_send, wait_in_connect,
                                       have_children};
    enum { THREADS = sizeof bodies / sizeof *bodies };
    unsigned used = count > 1 ? (unsigned)atoi(arguments[1]) : THREADS;
    lenient = count > 2;
    signal(SIGUSR1, on_signal);
    if (pipe(to_reader))
        wrong("pipe");
    for (uintptr_t i = 0; i < used && i < THREADS; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, bodies[i], (void *)i))
            wrong("pthread_create");
    }
    puts("up");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) { /* answers when each thread came on twice since it was asked */
        uint64_t then[THREADS];
        for (unsigned i = 0; i < used; i++)
            then[i] = rounds[i];
        double begun = now();
        for (unsigned i = 0; i < used; i++)
            while (rounds[i] < then[i] + 2) {
                if (now() - begun > 20) {
                    fprintf(stderr, "thread %u stands still\n", i);
                    _exit(9);
                }
                usleep(500);
            }
        puts("well");
        fflush(stdout);
    }
    return 0;
}
