/* SPDX-License-Identifier: MIT
 * What guard.c and inject.c share: a process whose threads stand still. */
#ifndef DIRTYTRACK_GUARD_H
#define DIRTYTRACK_GUARD_H
#include "internal.h"

typedef struct dt_thread {
    pid_t tid;
    bool stopped;
    bool gone;
    int owed;                     /* a stop signal that is to be sent again */
    int met;                      /* a stop that was told while another thread was waited for: its status; 0: none */
} dt_thread;

typedef struct dt_guard {
    const dt_guard_wish *wish;
    dt_thread *threads;
    uint64_t count, room;
    uint64_t deadline;            /* of dt_now_ns */
    uint64_t stopped_ns;          /* when the first thread was asked to stop */
    uint64_t freed_ns;            /* when all that had stopped went on */
    uint64_t steps;               /* calls of ptrace and pidfd_getfd so far */
} dt_guard;

/* guard.c */
uint64_t dt_now_ns(void);
long dt_ptrace(dt_guard *g, int request, pid_t tid, void *address, void *data); /* 0 or -errno; counted as a step */
void dt_guard_step(dt_guard *g);
int dt_guard_wait(dt_guard *g, dt_thread *t, uint64_t deadline, int *status); /* 0, -ETIMEDOUT, -ESRCH */

/* inject.c */
typedef struct dt_gadget {
    uint64_t call;                /* a system call instruction */
    uint64_t give_back;           /* a call of rt_sigreturn; 0: there is none, or no `ret` follows the other */
} dt_gadget;
/* Looks for them in the target's text. 0, or -ENOEXEC: there is no system call instruction. */
int dt_find_gadget(pid_t pid, dt_gadget *out);
/* Has a stopped thread make a userfaultfd, which is taken out of the process. A descriptor or -errno, *step says of what;
 * -EBUSY: not this thread now. */
int dt_inject(dt_guard *g, dt_thread *t, const dt_gadget *gadget, int32_t *step);
/* Of a stopped thread that is about to go on: where our stop had a system call give up that the kernel does not restart
 * after a stop, it is made again. */
void dt_mend_call(dt_guard *g, dt_thread *t);

/* registers.c */
int dt_save_registers(dt_guard *g); /* of all threads, which stand: a memory file of dt_thread_state, or -errno */

/* frame.c */
typedef struct dt_frame { uint64_t at; uint8_t *before; size_t bytes; } dt_frame;
#if defined(__x86_64__)
struct user_regs_struct;
bool dt_frame_make(dt_guard *g, pid_t tid, const dt_gadget *gadget, const struct user_regs_struct *r, uint64_t mask,
                   dt_frame *out);
void dt_frame_unmake(dt_guard *g, dt_frame *frame);
#endif
#endif
