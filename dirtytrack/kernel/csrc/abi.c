/* SPDX-License-Identifier: MIT
 * Holds abi.h to the kernel's ABI: by the numbers, and by the system's headers as far as they know the names. */
#include "abi.h"
#include "dirtytrack.h"
#include <assert.h>
#include <linux/fs.h>
#include <linux/userfaultfd.h>

static_assert(sizeof(struct k_page_region) == 24, "struct page_region");
static_assert(sizeof(struct k_pm_scan_arg) == 96, "struct pm_scan_arg");
static_assert(sizeof(struct k_procmap_query) == 104, "struct procmap_query");
static_assert(sizeof(struct k_uffdio_api) == 24, "struct uffdio_api");
static_assert(sizeof(struct k_uffdio_range) == 16, "struct uffdio_range");
static_assert(sizeof(struct k_uffdio_register) == 32, "struct uffdio_register");
static_assert(sizeof(struct k_uffdio_writeprotect) == 24, "struct uffdio_writeprotect");
static_assert(sizeof(struct k_uffd_msg) == sizeof(struct uffd_msg), "struct uffd_msg");
static_assert(K_UFFD_EVENT_REMAP == UFFD_EVENT_REMAP && K_UFFD_EVENT_REMOVE == UFFD_EVENT_REMOVE &&
              K_UFFD_EVENT_UNMAP == UFFD_EVENT_UNMAP, "events");

/* What Python reads as arrays of 64-bit numbers. */
static_assert(sizeof(dt_run) == 16, "dt_run");
static_assert(sizeof(dt_page_region) == 24, "dt_page_region");

/* A few architectures encode an ioctl's direction and size in another way. */
#if defined(__x86_64__) || defined(__aarch64__) || (defined(__riscv) && __riscv_xlen == 64) || defined(__s390x__)
static_assert(K_PAGEMAP_SCAN == 0xC0606610u, "PAGEMAP_SCAN");
static_assert(K_PROCMAP_QUERY == 0xC0686611u, "PROCMAP_QUERY");
static_assert(K_UFFDIO_API == 0xC018AA3Fu, "UFFDIO_API");
static_assert(K_UFFDIO_REGISTER == 0xC020AA00u, "UFFDIO_REGISTER");
static_assert(K_UFFDIO_UNREGISTER == 0x8010AA01u, "UFFDIO_UNREGISTER");
static_assert(K_UFFDIO_WRITEPROTECT == 0xC018AA06u, "UFFDIO_WRITEPROTECT");
static_assert(K_USERFAULTFD_IOC_NEW == 0xAA00u, "USERFAULTFD_IOC_NEW");
#endif

#define SAME(ours, theirs) static_assert((ours) == (theirs), #theirs)
#define SAME_FIELD(ours, theirs, field) \
    static_assert(offsetof(struct ours, field) == offsetof(struct theirs, field), #theirs "." #field)

#ifdef PAGEMAP_SCAN /* <linux/fs.h> of Linux 6.7 */
SAME(K_PAGEMAP_SCAN, PAGEMAP_SCAN);
SAME(K_PAGE_IS_WPALLOWED, PAGE_IS_WPALLOWED);
SAME(K_PAGE_IS_WRITTEN, PAGE_IS_WRITTEN);
SAME(K_PAGE_IS_FILE, PAGE_IS_FILE);
SAME(K_PAGE_IS_PRESENT, PAGE_IS_PRESENT);
SAME(K_PAGE_IS_SWAPPED, PAGE_IS_SWAPPED);
SAME(K_PAGE_IS_PFNZERO, PAGE_IS_PFNZERO);
SAME(K_PAGE_IS_HUGE, PAGE_IS_HUGE);
SAME(K_PM_SCAN_WP_MATCHING, PM_SCAN_WP_MATCHING);
SAME(K_PM_SCAN_CHECK_WPASYNC, PM_SCAN_CHECK_WPASYNC);
SAME_FIELD(k_page_region, page_region, categories);
SAME_FIELD(k_pm_scan_arg, pm_scan_arg, walk_end);
SAME_FIELD(k_pm_scan_arg, pm_scan_arg, max_pages);
SAME_FIELD(k_pm_scan_arg, pm_scan_arg, category_inverted);
SAME_FIELD(k_pm_scan_arg, pm_scan_arg, category_mask);
SAME_FIELD(k_pm_scan_arg, pm_scan_arg, category_anyof_mask);
SAME_FIELD(k_pm_scan_arg, pm_scan_arg, return_mask);
#endif
#ifdef PAGE_IS_SOFT_DIRTY
SAME(K_PAGE_IS_SOFT_DIRTY, PAGE_IS_SOFT_DIRTY);
#endif
#ifdef PAGE_IS_GUARD
SAME(K_PAGE_IS_GUARD, PAGE_IS_GUARD);
#endif
#ifdef PROCMAP_QUERY /* <linux/fs.h> of Linux 6.11 */
SAME(K_PROCMAP_QUERY, PROCMAP_QUERY);
SAME(K_VMA_READABLE, PROCMAP_QUERY_VMA_READABLE);
SAME(K_VMA_WRITABLE, PROCMAP_QUERY_VMA_WRITABLE);
SAME(K_VMA_EXECUTABLE, PROCMAP_QUERY_VMA_EXECUTABLE);
SAME(K_VMA_SHARED, PROCMAP_QUERY_VMA_SHARED);
SAME(K_VMA_COVERING_OR_NEXT, PROCMAP_QUERY_COVERING_OR_NEXT_VMA);
SAME_FIELD(k_procmap_query, procmap_query, vma_page_size);
SAME_FIELD(k_procmap_query, procmap_query, inode);
SAME_FIELD(k_procmap_query, procmap_query, vma_name_size);
SAME_FIELD(k_procmap_query, procmap_query, vma_name_addr);
#endif

SAME(K_UFFD_API, UFFD_API);
SAME(K_UFFDIO_API, UFFDIO_API);
SAME(K_UFFDIO_REGISTER, UFFDIO_REGISTER);
SAME(K_UFFDIO_UNREGISTER, UFFDIO_UNREGISTER);
SAME_FIELD(k_uffdio_register, uffdio_register, mode);
#ifdef UFFDIO_WRITEPROTECT
SAME(K_UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT);
SAME(K_UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_WP);
SAME(K_UFFDIO_WRITEPROTECT_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP);
SAME_FIELD(k_uffdio_writeprotect, uffdio_writeprotect, mode);
#endif
#ifdef UFFD_USER_MODE_ONLY
SAME(K_UFFD_USER_MODE_ONLY, UFFD_USER_MODE_ONLY);
#endif
#ifdef USERFAULTFD_IOC_NEW
SAME(K_USERFAULTFD_IOC_NEW, USERFAULTFD_IOC_NEW);
#endif
#ifdef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
SAME(K_UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
#endif
#ifdef UFFD_FEATURE_WP_UNPOPULATED
SAME(K_UFFD_FEATURE_WP_UNPOPULATED, UFFD_FEATURE_WP_UNPOPULATED);
#endif
#ifdef UFFD_FEATURE_WP_ASYNC
SAME(K_UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_ASYNC);
#endif
