/* SPDX-License-Identifier: MIT
 * What an injected call returns into if the guardian dies: a signal frame below the thread's stack, as the kernel would
 * make it for a handler, that has everything as it was. x86-64 only. Layouts: <asm/sigcontext.h>, <asm/ucontext.h>. */
#include "guard.h"
#if defined(__x86_64__)
#include <assert.h>
#include <cpuid.h>
#include <elf.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <unistd.h>

typedef struct k_sigcontext {
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, flags;
    uint16_t cs, gs, fs, ss;
    uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
} k_sigcontext;
typedef struct k_ucontext {
    uint64_t flags, link;
    struct { uint64_t sp; int32_t flags; uint64_t size; } stack;
    k_sigcontext context;
    uint64_t mask;
} k_ucontext;
typedef struct k_frame {
    uint64_t returns_to;
    k_ucontext uc;
    uint8_t info[128];
} k_frame;
typedef struct k_fp_software { uint32_t magic, extended_bytes; uint64_t features; uint32_t bytes, padding[7]; } k_fp_software;
static_assert(sizeof(k_sigcontext) == 256 && sizeof(k_ucontext) == 304, "as the kernel has them");

enum { RED_ZONE = 128, SOFTWARE_AT = 464, LEAST_BYTES = 576, TILE_DATA = 18 };
#define UC_FLAGS 7u           /* UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS */
#define MAGIC1 0x46505853u
#define MAGIC2 0x46505845u
#define RESTART_FIRST 512     /* ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND: the kernel's, never seen by programs */
#define RESTART_LAST 514
#define RESTART_BLOCK 516

/* Of the processor's state in the layout that signal frames have, which leaves a program the large tile registers only
 * where it asked for them. 0: they are in use, and no frame can be made here. */
static uint32_t state_bytes(const uint8_t *state, uint64_t *features)
{
    uint64_t in_use;
    memcpy(features, state + SOFTWARE_AT, sizeof *features);
    memcpy(&in_use, state + 512, sizeof in_use);
    if (in_use >> TILE_DATA & 1)
        return 0;
    *features &= ~((uint64_t)1 << TILE_DATA);
    uint32_t bytes = LEAST_BYTES;
    for (unsigned i = 2; i < 63; i++) {
        uint32_t size, offset, c, d;
        if (*features >> i & 1 && __get_cpuid_count(0xd, i, &size, &offset, &c, &d))
            bytes = (uint32_t)dt_max(bytes, offset + size);
    }
    return bytes;
}

static void fill(k_frame *frame, const struct user_regs_struct *r, uint64_t mask, uint64_t restorer, uint64_t fpstate)
{
    int64_t answer = (int64_t)r->rax;
    bool in_call = (int64_t)r->orig_rax >= 0;
    bool again = in_call && -answer >= RESTART_FIRST && -answer <= RESTART_LAST;
    *frame = (k_frame){.returns_to = restorer};
    frame->uc = (k_ucontext){.flags = UC_FLAGS, .mask = mask};
    frame->uc.stack.flags = -1; /* which the kernel passes over: the thread's own alternative stack stays */
    frame->uc.context = (k_sigcontext){
        r->r8, r->r9, r->r10, r->r11, r->r12, r->r13, r->r14, r->r15, r->rdi, r->rsi, r->rbp, r->rbx, r->rdx,
        again ? r->orig_rax : in_call && -answer == RESTART_BLOCK ? (uint64_t)-EINTR : r->rax,
        r->rcx, r->rsp, again ? r->rip - 2 : r->rip, r->eflags, (uint16_t)r->cs, (uint16_t)r->gs, (uint16_t)r->fs,
        (uint16_t)r->ss, 0, 0, 0, 0, fpstate, {0}};
}

/* All of it lies in the mapping that the thread's stack is in now: below that may be anything. */
static bool fits(pid_t pid, uint64_t start, uint64_t stack)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/maps", (int)pid);
    dt_space space = {pid, open(path, O_RDONLY | O_CLOEXEC)};
    dt_mapping m;
    bool fits = space.maps >= 0 && !dt_mapping_of(&space, start, &m) && m.start <= start && m.end >= stack && m.writable;
    if (space.maps >= 0)
        close(space.maps);
    return fits;
}

static bool shadow_stack(pid_t tid)
{
    dt_space thread = {tid, -1};
    FILE *status = dt_open_proc(&thread, "status");
    char line[256];
    bool has = !status;
    while (status && fgets(line, sizeof line, status))
        has |= !strncmp(line, "x86_Thread_features:", 20) && strstr(line, "shstk");
    if (status)
        fclose(status);
    return has;
}

static bool move(bool write, pid_t pid, uint64_t at, void *bytes, size_t n)
{
    struct iovec here = {bytes, n}, there = {(void *)at, n};
    return (write ? process_vm_writev(pid, &here, 1, &there, 1, 0) : process_vm_readv(pid, &here, 1, &there, 1, 0)) == (ssize_t)n;
}

bool dt_frame_make(dt_guard *g, pid_t tid, const dt_gadget *gadget, const struct user_regs_struct *r, uint64_t mask,
                   dt_frame *out)
{
    *out = (dt_frame){0};
    static uint8_t state[1 << 16] __attribute__((aligned(64)));
    struct iovec vector = {state, sizeof state - 64};
    uint64_t features;
    if (!gadget->give_back || shadow_stack(tid) ||
        dt_ptrace(g, PTRACE_GETREGSET, tid, (void *)NT_X86_XSTATE, &vector) || vector.iov_len < LEAST_BYTES)
        return false;
    uint32_t bytes = state_bytes(state, &features);
    if (!bytes || bytes > vector.iov_len)
        return false;
    k_fp_software software = {.magic = MAGIC1, .extended_bytes = bytes + 4, .features = features, .bytes = bytes};
    memcpy(state + SOFTWARE_AT, &software, sizeof software);
    uint32_t magic = MAGIC2;
    memcpy(state + bytes, &magic, sizeof magic);
    uint64_t fpstate = dt_down(r->rsp - RED_ZONE - bytes - 4, 64), at = dt_down(fpstate - sizeof(k_frame), 16);
    size_t all = (size_t)(fpstate - at) + bytes + 4;
    if (r->rsp < all + RED_ZONE + 4096 || !fits(g->wish->pid, at, r->rsp))
        return false;
    uint8_t *made = dt_alloc(all), *before = dt_alloc(all);
    if (made && before && move(false, g->wish->pid, at, before, all)) {
        k_frame frame;
        fill(&frame, r, mask, gadget->give_back, fpstate);
        memcpy(made, &frame, sizeof frame);
        memcpy(made + (fpstate - at), state, bytes + 4);
        if (move(true, g->wish->pid, at, made, all))
            *out = (dt_frame){at, before, all};
    }
    dt_guard_step(g);
    dt_free(made);
    if (!out->at)
        dt_free(before);
    return out->at != 0;
}

void dt_frame_unmake(dt_guard *g, dt_frame *frame)
{
    if (frame->at)
        move(true, g->wish->pid, frame->at, frame->before, frame->bytes);
    dt_free(frame->before);
    *frame = (dt_frame){0};
}
#endif
