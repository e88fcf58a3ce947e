/* SPDX-License-Identifier: MIT
 * Our slice of <linux/fs.h> and <linux/userfaultfd.h>: distribution headers (Debian 12: Linux 6.1) are older than
 * PAGEMAP_SCAN and WP_ASYNC (both Linux 6.7). abi.c asserts that it agrees with the system's headers where those know. */
#ifndef DIRTYTRACK_ABI_H
#define DIRTYTRACK_ABI_H
#include <stdint.h>
#include <sys/ioctl.h>

/* ---- <linux/fs.h>: PAGEMAP_SCAN ---- */
struct k_page_region { uint64_t start, end, categories; };
struct k_pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define K_PAGEMAP_SCAN _IOWR('f', 16, struct k_pm_scan_arg)
#define K_PAGE_IS_WPALLOWED (1u << 0)
#define K_PAGE_IS_WRITTEN (1u << 1)
#define K_PAGE_IS_FILE (1u << 2)
#define K_PAGE_IS_PRESENT (1u << 3)
#define K_PAGE_IS_SWAPPED (1u << 4)
#define K_PAGE_IS_PFNZERO (1u << 5)
#define K_PAGE_IS_HUGE (1u << 6)
#define K_PAGE_IS_SOFT_DIRTY (1u << 7)
#define K_PAGE_IS_GUARD (1u << 8)
#define K_PM_SCAN_WP_MATCHING (1u << 0)
#define K_PM_SCAN_CHECK_WPASYNC (1u << 1)

/* ---- <linux/fs.h>: PROCMAP_QUERY (Linux 6.11), on /proc/PID/maps ---- */
struct k_procmap_query {
    uint64_t size, query_flags, query_addr;
    uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
#define K_PROCMAP_QUERY _IOWR('f', 17, struct k_procmap_query)
#define K_VMA_READABLE 0x01u
#define K_VMA_WRITABLE 0x02u
#define K_VMA_EXECUTABLE 0x04u
#define K_VMA_SHARED 0x08u
#define K_VMA_COVERING_OR_NEXT 0x10u

/* ---- <linux/userfaultfd.h> ---- */
struct k_uffdio_api { uint64_t api, features, ioctls; };
struct k_uffdio_range { uint64_t start, len; };
struct k_uffdio_register { struct k_uffdio_range range; uint64_t mode, ioctls; };
struct k_uffdio_writeprotect { struct k_uffdio_range range; uint64_t mode; };
struct k_uffd_msg { /* of its many shapes, those that are read here */
    uint8_t event, reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    union {
        struct { uint64_t start, end; } remove;
        struct { uint64_t from, to, len; } remap;
    } arg;
};
#define K_UFFD_EVENT_REMAP 0x14u
#define K_UFFD_EVENT_REMOVE 0x15u
#define K_UFFD_EVENT_UNMAP 0x16u
#define K_UFFD_API 0xAAu
#define K_UFFDIO_API _IOWR(0xAA, 0x3F, struct k_uffdio_api)
#define K_UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct k_uffdio_register)
#define K_UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct k_uffdio_range)
#define K_UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct k_uffdio_writeprotect)
#define K_USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#define K_UFFD_USER_MODE_ONLY 1u
#define K_UFFDIO_REGISTER_MODE_WP (1u << 1)
#define K_UFFDIO_WRITEPROTECT_MODE_WP (1u << 0)
#define K_UFFD_FEATURE_EVENT_REMAP (1u << 2)
#define K_UFFD_FEATURE_EVENT_REMOVE (1u << 3)
#define K_UFFD_FEATURE_EVENT_UNMAP (1u << 6)
#define K_UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1u << 12)
#define K_UFFD_FEATURE_WP_UNPOPULATED (1u << 13)
#define K_UFFD_FEATURE_WP_ASYNC (1u << 15)
#endif
