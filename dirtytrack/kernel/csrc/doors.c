/* SPDX-License-Identifier: MIT
 * The ways to a userfaultfd, and to the page map. */
#include "engine.h"
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

int dt_open_door(enum dt_door door)
{
    static const enum dt_site sites[] = {0, DT_SITE_OPEN_USER_MODE, DT_SITE_OPEN_DEVICE, DT_SITE_OPEN_FULL};
    int fail = dt_fail_at(sites[door]);
    if (fail)
        return fail > 0 ? -fail : fail;
    if (door != DT_DOOR_DEVICE) {
        long flags = O_CLOEXEC | O_NONBLOCK | (door == DT_DOOR_USER_MODE ? (long)K_UFFD_USER_MODE_ONLY : 0);
        long fd = syscall(SYS_userfaultfd, flags);
        return fd < 0 ? -errno : (int)fd;
    }
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -errno;
    int fd = ioctl(device, K_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    int error = errno;
    close(device);
    return fd < 0 ? -error : fd;
}

/* With WP_ASYNC the user-mode descriptor tracks the kernel's writes too (measured, Linux 6.12-7.3), so the door that
 * needs no privilege comes first. */
int dt_open_any_door(dt_failure *why, int *door)
{
    int first = 0;
    for (int d = DT_DOOR_USER_MODE; d <= DT_DOOR_FULL; d++) {
        int fd = dt_open_door((enum dt_door)d);
        if (fd >= 0) {
            *door = d;
            return fd;
        }
        if (!first)
            first = fd;
        if (fd == -EMFILE || fd == -ENFILE || fd == -ENOMEM) { /* no door would open: tell the real reason */
            first = fd;
            break;
        }
    }
    if (why)
        why->door = DT_DOOR_USER_MODE;
    return dt_fail_with(why, first, -first, DT_STEP_USERFAULTFD, 0, 0);
}

int dt_uffd_api(int fd, uint64_t features, uint64_t *all)
{
    struct k_uffdio_api api = {.api = K_UFFD_API, .features = features};
    int rc = dt_checked_ioctl(DT_SITE_API, fd, K_UFFDIO_API, &api);
    if (!rc && all)
        *all = api.features;
    return rc;
}

int dt_open_pagemap(void)
{
    int fail = dt_fail_at(DT_SITE_OPEN_PAGEMAP);
    if (fail)
        return fail > 0 ? -fail : fail;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}
