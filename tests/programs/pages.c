/* SPDX-License-Identifier: MIT
 * Does to its memory what its standard input says, and answers each line with an address in hex:
 *   map PAGES | write ADDRESS PAGE | unmap ADDRESS PAGES | grow ADDRESS FROM TO | move ADDRESS PAGES | again ADDRESS PAGES
 *   discard ADDRESS PAGE | share PAGES | file PATH PAGES | vfork MILLISECONDS | exec | guard ADDRESS PAGE | busy ADDRESS PAGES
 *   out ADDRESS PAGES (into swap) | hide ADDRESS PAGES (1: MADV_DONTDUMP, 0: MADV_DODUMP) | rights ADDRESS PAGES RIGHTS | brk PAGES | reserve PAGES
 *   over ADDRESS PAGES OTHER (in decimal): the shared memory of one place is mapped at the other too */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };
static char **own_arguments;

static void *mapped(size_t pages, int flags, int fd)
{
    char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED)
        _exit(8);
    for (size_t i = 0; i < pages; i++)
        at[i * PAGE] = 1;
    return at;
}

static void *wait_for_child(void *milliseconds)
{
    if (!vfork()) {
        usleep((useconds_t)(uintptr_t)milliseconds * 1000);
        _exit(0);
    }
    wait(NULL);
    return NULL;
}

static int take(char *at, size_t bytes)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    struct uffdio_api api = {.api = UFFD_API, .features = 0};
    struct uffdio_register request = {.range = {(uintptr_t)at, bytes}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    return ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &request);
}

int main(int count, char **arguments)
{
    (void)count;
    own_arguments = arguments;
    setvbuf(stdin, NULL, _IONBF, 0); /* no page of ours but the stack is written by reading */
    puts("up");
    fflush(stdout);
    char line[512], word[16], path[400];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long a = 0, b = 0, c = 0;
        char *at;
        if (sscanf(line, "file %399s %lu", path, &a) == 2) {
            int fd = open(path, O_RDWR);
            at = mapped(a, MAP_PRIVATE, fd);
            close(fd);
        } else {
            if (sscanf(line, "%15s %lx %lu %lu", word, &a, &b, &c) < 1)
                strcpy(word, "nothing");
            at = (char *)a;
            if (!strcmp(word, "map"))
                at = mapped(strtoul(line + 4, NULL, 10), MAP_PRIVATE | MAP_ANONYMOUS, -1);
            else if (!strcmp(word, "share"))
                at = mapped(strtoul(line + 6, NULL, 10), MAP_SHARED | MAP_ANONYMOUS, -1);
            else if (!strcmp(word, "write"))
                at[b * PAGE]++;
            else if (!strcmp(word, "unmap"))
                munmap(at, b * PAGE);
            else if (!strcmp(word, "grow"))
                at = mremap(at, b * PAGE, c * PAGE, MREMAP_MAYMOVE);
            else if (!strcmp(word, "move"))
                at = mremap(at, b * PAGE, b * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, mapped(b, MAP_PRIVATE | MAP_ANONYMOUS, -1));
            else if (!strcmp(word, "over"))
                at = mremap(at, 0, b * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)c);
            else if (!strcmp(word, "again"))
                at = mmap(at, b * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            else if (!strcmp(word, "discard"))
                madvise(at + b * PAGE, PAGE, MADV_DONTNEED);
            else if (!strcmp(word, "punch"))
                madvise(at + b * PAGE, PAGE, MADV_REMOVE);
            else if (!strcmp(word, "out"))
                madvise(at, b * PAGE, 21 /* MADV_PAGEOUT */);
            else if (!strcmp(word, "hide"))
                madvise(at, b * PAGE, c ? MADV_DONTDUMP : MADV_DODUMP);
            else if (!strcmp(word, "rights"))
                mprotect(at, b * PAGE, (int)c);
            else if (!strcmp(word, "brk")) {
                at = sbrk((intptr_t)strtol(line + 4, NULL, 10) * PAGE);
                if (line[4] != '-')
                    *at = 1;
            } else if (!strcmp(word, "reserve"))
                at = mmap(NULL, strtoul(line + 8, NULL, 10) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            else if (!strcmp(word, "busy"))
                at = take(at, b * PAGE) ? NULL : at;
            else if (!strcmp(word, "vfork")) {
                pthread_t thread;
                pthread_create(&thread, NULL, wait_for_child, (void *)strtoul(line + 6, NULL, 10));
                usleep(20000);
            } else if (!strcmp(word, "vfork-alone"))
                wait_for_child((void *)strtoul(line + 12, NULL, 10));
            else if (!strcmp(word, "exec"))
                execv("/proc/self/exe", own_arguments);
        }
        printf("%lx\n", (unsigned long)(uintptr_t)at);
        fflush(stdout);
    }
    return 0;
}
