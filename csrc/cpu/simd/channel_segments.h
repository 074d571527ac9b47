// The loop over the pieces of a ChannelRuns.
#pragma once

#include "../channel_runs.h"

namespace fastvae {
inline namespace FASTVAE_ISA {
namespace {

// Some positions of a run. `element` is the first of their elements in the tensor, `position` their first position in it.
struct Segment {
  int64_t run, slot, element, position, positions;
};

// Calls f(segment) for the pieces of an item: one piece of a long run, or several short runs.
template <class F>
FASTVAE_INLINE void for_each_segment(const ChannelRuns& runs, bool channels_last, int64_t begin_item, int64_t end_item, F f) {
  int64_t step = channels_last ? runs.channels : 1;
  for (int64_t item = begin_item; item < end_item; ++item) {
    int64_t first = item / runs.pieces_per_run * runs.runs_per_item, part = item % runs.pieces_per_run;
    int64_t end = min64(first + runs.runs_per_item, runs.count);
    for (int64_t run = first; run < end; ++run)
      f(Segment{run, runs.shared ? item : run * runs.pieces_per_run + part, run * runs.positions * runs.channels + part * runs.piece * step,
                run * runs.positions + part * runs.piece, runs.piece_length(part)});
  }
}

}  // namespace
}  // namespace FASTVAE_ISA
}  // namespace fastvae
