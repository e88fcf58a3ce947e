/* SPDX-License-Identifier: MIT
 * What a set has of several memories, cut into parts of bounded length: the frames of a checkpoint. */
#include "internal.h"

void dt_set_cut(const dt_set *set, const dt_extent *memories, uint64_t n, uint64_t most_nbytes, dt_span *spans,
                uint64_t span_room, dt_cut *cuts, uint64_t cut_room, dt_cut *total)
{
    uint64_t span_count = 0, cut_count = 0, nbytes = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t address = memories[i].address, end = address + memories[i].nbytes;
        uint64_t left = 0; /* what the cut that was begun has room for: each memory begins its own */
        for (uint64_t k = dt_set_first(set, address); k < set->count && set->runs[k].start < end; k++) {
            uint64_t at = dt_max(set->runs[k].start, address), stop = dt_min(set->runs[k].end, end);
            while (at < stop) {
                if (!left) {
                    if (cut_count < cut_room)
                        cuts[cut_count] = (dt_cut){.memory = i, .first = span_count};
                    cut_count++;
                    left = most_nbytes;
                }
                uint64_t bytes = dt_min(stop - at, left);
                if (span_count < span_room)
                    spans[span_count] = (dt_span){at - address, bytes};
                span_count++;
                if (cut_count <= cut_room) {
                    cuts[cut_count - 1].count++;
                    cuts[cut_count - 1].nbytes += bytes;
                }
                left -= bytes;
                nbytes += bytes;
                at += bytes;
            }
        }
    }
    *total = (dt_cut){.memory = cut_count, .count = span_count, .nbytes = nbytes};
}
