/* SPDX-License-Identifier: MIT
 *
 * Write barriers side by side, on one heap and for the same programs: a copying nursery beside an old generation that is
 * marked and swept, as in examples/barrier.c. Prints JSON. Compiled with the core by benchmarks/gc_barriers.py, twice: with
 * -DCARDS each store of a pointer marks a card, without it nothing is added to a store.
 *
 *     barriers BARRIER gcbench DEPTH
 *     barriers BARRIER stores SHARE PER_PAGE same|anew EPOCHS WARM
 *
 * BARRIER: none (each minor collection searches the whole old generation), cards, mprotect, plain, adaptive.
 */
#include <dirtytrack.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include "words.h" /* the vectors of dt_find_slots, so that cards are not read by a slower loop */

#define CARD_SHIFT 9

static uintptr_t card_bias; /* cards of all of the heap: no store asks first whether it is an old object */
#ifdef CARDS
#define STORE(slot, value) (*(slot) = (value), *(uint8_t *)(card_bias + ((uintptr_t)(slot) >> CARD_SHIFT)) = 1)
#else
#define STORE(slot, value) (*(slot) = (value))
#endif
#include "gcbench.h"

enum { PAGE = 4096, PAGE_NODES = PAGE / sizeof(node), NURSERY_NODES = 1 << 17, OLD_NODES = 1 << 22, MOST_PAUSES = 1 << 20 };
#define OLD_BYTES (OLD_NODES * sizeof(node))

static node *nursery, *nursery_top, *old, *free_cells;
static uint64_t old_used, free_count, work_count;
static uint8_t *marks;
static node **work;
static uint64_t *slots, slot_count; /* what the barrier found */
static uint64_t *pauses, pause_count;

static void fail(const char *what, int code)
{
    fprintf(stderr, "barriers: %s: %d\n", what, code);
    exit(1);
}

static void *map(uint64_t nbytes)
{
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap", 0);
    madvise(memory, nbytes, MADV_NOHUGEPAGE); /* the same pages for each barrier, whatever the machine does by itself */
    return memory;
}

/* ---- barriers: `find` is called when the program has stopped, `resume` when the collector has written what it wanted ---- */

typedef struct barrier {
    const char *name;
    void (*open)(void), (*find)(void), (*resume)(void);
} barrier;

static uint64_t old_bytes(void) { return old_used * sizeof(node); }

/* The slots in a set's pages. */
static void find_in(const dt_set *set)
{
    static dt_slots found;
    const dt_pointers plain = {.mask = 7};
    const dt_run young = {(uintptr_t)nursery, (uintptr_t)(nursery + NURSERY_NODES)};
    const dt_extent heap = {.address = (uintptr_t)old, .nbytes = old_bytes()};
    dt_set kept = {0};
    int code = dt_find_slots(set, &heap, 1, &plain, &young, young.start, young.end, &found, &kept);
    if (code)
        fail("dt_find_slots", code);
    dt_set_clear(&kept);
    slots = found.addresses;
    slot_count = found.count;
}

static void find_in_runs(const dt_run *runs, uint64_t n)
{
    dt_set set = {0};
    int code = dt_set_copy(runs, n, &set);
    if (code)
        fail("dt_set_copy", code);
    find_in(&set);
    dt_set_clear(&set);
}

static void nothing(void) { }

static void find_everywhere(void)
{
    const dt_run all = {(uintptr_t)old, ((uintptr_t)old + old_bytes() + PAGE - 1) & ~(uintptr_t)(PAGE - 1)};
    find_in_runs(&all, all.end > all.start);
}

/* Software cards of 512 bytes. */

static void open_cards(void)
{
#ifndef CARDS
    fail("stores mark no cards: compile with -DCARDS", 0);
#endif
    slots = map(OLD_BYTES); /* room for every word */
}

static void find_in_cards(void)
{
    uint8_t *cards = (uint8_t *)(card_bias + ((uintptr_t)old >> CARD_SHIFT));
    uint64_t count = (old_bytes() + (1 << CARD_SHIFT) - 1) >> CARD_SHIFT, eight;
    dt_scan_words *scan = dt_words_scanner(false);
    const dt_needle young = {.keep = ~UINT64_C(0), .low = (uintptr_t)nursery, .span = NURSERY_NODES * sizeof(node), .mask = 7};
    slot_count = 0;
    for (uint64_t i = 0; i < count;) {
        if (i % 8 == 0 && i + 8 <= count && (memcpy(&eight, cards + i, 8), !eight)) {
            i += 8;
            continue;
        }
        uint64_t first = i;
        while (i < count && i - first < 8 && cards[i])
            cards[i++] = 0;
        if (i == first) {
            i++;
            continue;
        }
        const uint8_t *bytes = (const uint8_t *)old + (first << CARD_SHIFT);
        uint64_t nbytes = dt_min((i - first) << CARD_SHIFT, old_bytes() - (first << CARD_SHIFT));
        slot_count += scan(bytes, bytes + nbytes, nbytes / 8, young, (uintptr_t)bytes, slots + slot_count);
    }
}

/* mprotect and SIGSEGV: the heap is opened for the collector and protected as a whole for the program, one call each. */

static uint64_t written[OLD_BYTES / PAGE / 64];

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    uint64_t page = ((uintptr_t)info->si_addr - (uintptr_t)old) / PAGE;
    if (page >= OLD_BYTES / PAGE || mprotect((uint8_t *)old + page * PAGE, PAGE, PROT_READ | PROT_WRITE))
        abort();
    written[page / 64] |= UINT64_C(1) << (page % 64);
}

static void protect(void)
{
    if (mprotect(old, OLD_BYTES, PROT_READ))
        fail("mprotect", 0);
}

static void open_mprotect(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    if (sigaction(SIGSEGV, &action, NULL))
        fail("sigaction", 0);
    protect();
}

static void find_in_written(void)
{
    static dt_run runs[OLD_BYTES / PAGE];
    uint64_t n = 0;
    if (mprotect(old, OLD_BYTES, PROT_READ | PROT_WRITE))
        fail("mprotect", 0);
    for (uint64_t i = 0; i < OLD_BYTES / PAGE / 64; i++)
        for (; written[i]; written[i] &= written[i] - 1) {
            uint64_t start = (uintptr_t)old + (i * 64 + (unsigned)__builtin_ctzll(written[i])) * PAGE;
            if (n && runs[n - 1].end == start)
                runs[n - 1].end += PAGE;
            else
                runs[n++] = (dt_run){start, start + PAGE};
        }
    find_in_runs(runs, n);
}

/* dirtytrack */

static dt_session *session;
static dt_region *region;
static dt_listener *listener;

static void open_tracked(int adaptive)
{
    dt_failure why = {0};
    int code = dt_session_open(DT_REMEDY_PROBE, 0, DT_BACKEND_KERNEL, &session, &why);
    if (!code)
        code = dt_register(session, (uintptr_t)old, OLD_BYTES, 0, DT_ARM_AUTO | DT_PINNED, &region, &why);
    if (!code)
        code = dt_listener_new(session, &listener);
    if (!code)
        code = dt_listener_wish(listener, adaptive, !adaptive, 0);
    if (!code)
        code = dt_start(listener, &region, 1, &why);
    if (code)
        fail("tracking", code);
}

static void open_plain(void) { open_tracked(0); }
static void open_adaptive(void) { open_tracked(1); }

/* Mutators stand still from here to the end of the pause, so it is enough to look: pages that are armed only once, at the
 * end, take the collector's own stores without a fault. */
static void find_tracked(void)
{
    dt_set dirty = {0};
    int code = dt_peek(listener, NULL, &dirty);
    if (code)
        fail("dt_peek", code);
    find_in(&dirty);
    dt_set_clear(&dirty);
}

static void forget_own_writes(void)
{
    dt_set dirty = {0};
    int code = dt_collect(listener, NULL, -1, &dirty);
    if (code)
        fail("dt_collect", code);
    dirty.delivered = 1;
    dt_set_clear(&dirty);
}

static const barrier BARRIERS[] = {
    {"none", nothing, find_everywhere, nothing},
    {"cards", open_cards, find_in_cards, nothing},
    {"mprotect", open_mprotect, find_in_written, protect},
    {"plain", open_plain, find_tracked, forget_own_writes},
    {"adaptive", open_adaptive, find_tracked, forget_own_writes},
};
static const barrier *with;

/* ---- the collector ---- */

static node *old_cell(void)
{
    if (free_cells) {
        node *cell = free_cells;
        free_cells = cell->left;
        free_count--;
        return cell;
    }
    if (old_used == OLD_NODES)
        fail("the heap is full", 0);
    return old + old_used++;
}

static void mark(node *n)
{
    if (n && !marks[n - old]) {
        marks[n - old] = 1;
        work[work_count++] = n;
    }
}

static void full(void)
{
    memset(marks, 0, old_used);
    for (unsigned i = 0; i < root_count; i++)
        mark(roots[i]);
    while (work_count) {
        node *n = work[--work_count];
        mark(n->left);
        mark(n->right);
    }
    free_cells = NULL;
    free_count = 0;
    for (uint64_t i = old_used; i--;) {
        if (marks[i])
            continue;
        old[i] = (node){.left = free_cells};
        free_cells = old + i;
        free_count++;
    }
}

static node *promote(node *n)
{
    if (n < nursery || n >= nursery + NURSERY_NODES)
        return n;
    if (n->number >> 63) /* it is a copy's address already */
        return n->left;
    node *copy = old_cell();
    *copy = *n;
    n->left = copy;
    n->number |= UINT64_C(1) << 63;
    work[work_count++] = copy;
    return copy;
}

static void minor(void)
{
    uint64_t began = now();
    with->find();
    for (uint64_t i = 0; i < slot_count; i++) {
        node **slot = (node **)(uintptr_t)slots[i];
        *slot = promote(*slot);
    }
    for (unsigned i = 0; i < root_count; i++)
        roots[i] = promote(roots[i]);
    while (work_count) {
        node *n = work[--work_count];
        n->left = promote(n->left);
        n->right = promote(n->right);
    }
    nursery_top = nursery;
    if (OLD_NODES - old_used + free_count < NURSERY_NODES)
        full();
    with->resume();
    if (pause_count < MOST_PAUSES)
        pauses[pause_count++] = now() - began;
}

static node *allocate(uint64_t depth, uint64_t number)
{
    if (nursery_top == nursery + NURSERY_NODES)
        minor();
    *nursery_top = (node){.depth = depth, .number = number};
    return nursery_top++;
}

/* ---- the programs ---- */

static void gcbench(unsigned depth)
{
    with->open();
    uint64_t began = now();
    run_gcbench(depth);
    printf("{\"total_ns\": %lu, ", (unsigned long)(now() - began));
    tell("pause_ns", pauses, pause_count, "}\n");
}

/* Stores into STORE_PAGES pages of old objects. In each epoch a share of the pages is written, `per_page` pointers each, of
 * which the last points to a young object; a minor collection ends it. */
enum { STORE_PAGES = 16384 };

static uint64_t random_state = 88172645463325252u;

static uint64_t random_below(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

static void store_some(const uint32_t *pages, uint64_t count, uint64_t per_page)
{
    for (uint64_t i = 0; i < count; i++) {
        node *first = old + (uint64_t)pages[i] * PAGE_NODES;
        for (uint64_t j = 1; j < per_page; j++) {
            node *into = first + j * 37 % PAGE_NODES;
            STORE((node *volatile *)&into->left, old);
        }
        STORE((node *volatile *)&first->right, allocate(1, i));
    }
}

static void stores(double share, uint64_t per_page, int anew, uint64_t epochs, uint64_t warm)
{
    static uint32_t pages[STORE_PAGES];
    uint64_t *mutator = map(epochs * 8), count = (uint64_t)(share * STORE_PAGES + 0.5);
    for (uint64_t i = 0; i < STORE_PAGES; i++)
        pages[i] = (uint32_t)i;
    for (node *n = old; n < old + (2 * STORE_PAGES) * PAGE_NODES; n++)
        *n = (node){.number = 1};
    with->open();
    for (uint64_t epoch = 0; epoch < warm + epochs; epoch++) {
        for (uint64_t i = 0; (anew || !epoch) && i < count; i++) {
            uint64_t other = i + random_below(STORE_PAGES - i);
            uint32_t page = pages[i];
            pages[i] = pages[other];
            pages[other] = page;
        }
        if (old_used < STORE_PAGES * PAGE_NODES || old_used + count > 2 * STORE_PAGES * PAGE_NODES)
            old_used = STORE_PAGES * PAGE_NODES; /* what was promoted long ago is garbage */
        uint64_t began = now();
        store_some(pages, count, per_page);
        if (epoch >= warm)
            mutator[epoch - warm] = now() - began;
        else
            pause_count = 0;
        minor();
        if (epoch >= warm && slot_count != count)
            fail("slots are missed, or found twice", (int)slot_count);
        if (epoch + 1 == warm)
            pause_count = 0;
    }
    printf("{\"stores\": %lu, ", (unsigned long)(count * per_page));
    tell("mutator_ns", mutator, epochs, ", ");
    tell("pause_ns", pauses, pause_count, "}\n");
}

int main(int argc, char **argv)
{
    for (unsigned i = 0; argc > 3 && i < sizeof BARRIERS / sizeof *BARRIERS; i++)
        if (!strcmp(argv[1], BARRIERS[i].name))
            with = BARRIERS + i;
    old = map(OLD_BYTES + NURSERY_NODES * sizeof(node));
    nursery = nursery_top = old + OLD_NODES;
    uint64_t cards = (OLD_BYTES + NURSERY_NODES * sizeof(node)) >> CARD_SHIFT;
    card_bias = (uintptr_t)map(cards) - ((uintptr_t)old >> CARD_SHIFT);
    marks = map(OLD_NODES);
    work = map(OLD_NODES * sizeof *work);
    pauses = map(MOST_PAUSES * sizeof *pauses);
    if (with && !strcmp(argv[2], "gcbench"))
        gcbench((unsigned)atoi(argv[3]));
    else if (with && !strcmp(argv[2], "stores") && argc == 8)
        stores(atof(argv[3]), (uint64_t)atoll(argv[4]), !strcmp(argv[5], "anew"), (uint64_t)atoll(argv[6]),
               (uint64_t)atoll(argv[7]));
    else
        return fprintf(stderr, "usage: see the file\n"), 2;
    return 0;
}
