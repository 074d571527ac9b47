// Functions for tests that expose the host's arithmetic of csrc/cuda/, and the workspace of a stream.
#include "cuda/launch.h"
#include "exports.h"

// The functions below expose the arithmetic of csrc/cuda/partition.h, codebook_partition.h, group_norm_partition.h, rms_norm_partition.h
// and noise.cuh.
#include "cuda/codebook_partition.h"
#include "cuda/group_norm_partition.h"
#include "cuda/noise.cuh"
#include "cuda/rms_norm_partition.h"

namespace {

fastvae::RowSums row_sums(int64_t length, int64_t numel, int64_t chunk) { return {fastvae::divider(length), numel, chunk}; }

// Counts in `visits` how often each element is read, and writes to `channels` the channel that it is taken for.
template <bool kChannelsLast>
void visit(const fastvae::GroupNormBlocks& blocks, int64_t* visits, int64_t* channels) {
  for (int64_t block = 0; block < blocks.count(); ++block)
    for (int thread = 0; thread < blocks.threads; ++thread) {
      int64_t rest = block / blocks.tiles;
      auto vectors =
          fastvae::thread_vectors<kChannelsLast>(blocks, rest / blocks.splits, block % blocks.tiles, rest % blocks.splits, thread);
      for (; vectors.positions_left > 0; vectors.skip(1))
        for (int k = 0; k < vectors.count(0); ++k) {
          visits[vectors.element + k] += 1;
          channels[vectors.element + k] = vectors.first_channel + (kChannelsLast ? k : 0);
        }
    }
}

// Counts in `visits` how often each element is read, and writes to `channels` and `positions` those that it is taken for; a position is one
// of (batch, positions).
template <bool kChannelsLast>
void visit_steps(const fastvae::RmsNormBlocks& b, int64_t* visits, int64_t* channels, int64_t* positions) {
  for (int64_t block = 0; block < b.count(); ++block)
    for (int thread = 0; thread < b.threads; ++thread) {
      int sample = static_cast<int>(block / b.splits), split = static_cast<int>(block % b.splits);
      auto vectors = fastvae::rms_norm_vectors<kChannelsLast>(b, sample, split, thread);
      for (int left = b.positions_of(split); left > 0; left -= b.step_positions, vectors.next_step(b.step_positions)) {
        auto current = vectors;
        for (int i = 0; i < b.vectors; ++i, current.skip(1))
          for (int k = 0; k < current.count(0); ++k) {
            visits[current.element + k] += 1;
            channels[current.element + k] = current.channel + (kChannelsLast ? k : 0);
            positions[current.element + k] = current.position + (kChannelsLast ? 0 : k);
          }
      }
    }
}

}  // namespace

EXPORT int64_t emulated_quotient(int64_t divisor, int64_t n) { return fastvae::quotient(fastvae::divider(divisor), n); }

EXPORT int emulated_vector_offset(int thread, int run) { return fastvae::vector_offset(thread, run); }

EXPORT void emulated_chunks(int64_t numel, int64_t max_blocks, int64_t* out) {
  fastvae::Chunks chunks = fastvae::chunks_of(numel, max_blocks);
  out[0] = chunks.elements;
  out[1] = chunks.blocks;
}

EXPORT int64_t emulated_owned_row(int64_t length, int64_t numel, int64_t chunk, int64_t block) {
  int64_t row = 0;
  return fastvae::owns_crossing_row(row_sums(length, numel, chunk), block, row) ? row : -1;
}

EXPORT int64_t emulated_last_block(int64_t length, int64_t numel, int64_t chunk, int64_t row) {
  return fastvae::last_block_of(row_sums(length, numel, chunk), row);
}

EXPORT int emulated_row_group(int64_t length) { return fastvae::row_group(length); }

EXPORT void emulated_columns(int64_t rows, int64_t columns, int64_t inner, int64_t* out) {
  fastvae::ColumnSums c = fastvae::column_sums_of(rows, columns, inner);
  out[0] = c.groups;
  out[1] = c.splits;
  out[2] = c.width;
  out[3] = c.rows_per_split;
}

EXPORT int64_t emulated_column_element(int64_t rows, int64_t columns, int64_t inner, int64_t row, int64_t column) {
  return fastvae::column_element(fastvae::column_sums_of(rows, columns, inner), row, column);
}

EXPORT void emulated_normals(int64_t seed, int64_t first, int lane, float* out) {
  float normals[fastvae::kRuns];
  fastvae::normals_from(fastvae::noise_key(&seed), first, lane, normals);
  for (int j = 0; j < fastvae::kRuns; ++j) out[j] = normals[j];
}

EXPORT void emulated_norm_blocks(int64_t batch, int64_t channels, int64_t positions, int64_t groups, int64_t channels_last,
                                 int64_t itemsize, int64_t max_blocks, int64_t group_bytes, int64_t many_groups, int64_t* out) {
  fastvae::GroupNormBlocks b =
      fastvae::group_norm_blocks(batch, channels, positions, groups, channels_last != 0, itemsize, {max_blocks, group_bytes, many_groups});
  int64_t values[] = {b.tile_channels, b.tiles, b.split_positions, b.splits, b.threads, b.threads_per_line, b.whole_groups};
  std::copy(std::begin(values), std::end(values), out);
}

// The vectors of a thread that a block keeps in `shared_bytes`, in steps of `runs` vectors of `vector_bytes`.
EXPORT int64_t emulated_kept_vectors(int64_t batch, int64_t channels, int64_t positions, int64_t groups, int64_t channels_last,
                                     int64_t itemsize, int64_t runs, int64_t vector_bytes, int64_t shared_bytes) {
  fastvae::GroupNormBlocks b =
      fastvae::group_norm_blocks(batch, channels, positions, groups, channels_last != 0, itemsize, {2048, 65536, 256});
  int64_t vectors = fastvae::vectors_of_group_thread(b, channels_last != 0);
  return fastvae::kept_vectors(vectors, b.threads, static_cast<int>(runs), vector_bytes, shared_bytes);
}

EXPORT void emulated_norm_visits(int64_t batch, int64_t channels, int64_t positions, int64_t groups, int64_t channels_last,
                                 int64_t itemsize, int64_t max_blocks, int64_t group_bytes, int64_t many_groups, int64_t* out) {
  fastvae::GroupNormBlocks b =
      fastvae::group_norm_blocks(batch, channels, positions, groups, channels_last != 0, itemsize, {max_blocks, group_bytes, many_groups});
  int64_t numel = batch * channels * positions;
  channels_last ? visit<true>(b, out, out + numel) : visit<false>(b, out, out + numel);
}

// The limits are the largest and the smallest number of blocks, and the bytes that a block keeps of a step.
EXPORT void emulated_rms_norm_blocks(int64_t batch, int64_t channels, int64_t positions, int64_t channels_last, int64_t itemsize,
                                     int64_t backward, int64_t max_blocks, int64_t min_blocks, int64_t tile_bytes, int64_t* out) {
  fastvae::RmsNormBlocks b = fastvae::rms_norm_blocks(batch, channels, positions, channels_last != 0, itemsize, backward != 0,
                                                      {max_blocks, min_blocks, tile_bytes});
  int64_t values[] = {b.split_positions, b.splits, b.step_positions, b.threads, b.threads_per_line};
  std::copy(std::begin(values), std::end(values), out);
}

EXPORT void emulated_rms_norm_visits(int64_t batch, int64_t channels, int64_t positions, int64_t channels_last, int64_t itemsize,
                                     int64_t backward, int64_t max_blocks, int64_t min_blocks, int64_t tile_bytes, int64_t* out) {
  fastvae::RmsNormBlocks b = fastvae::rms_norm_blocks(batch, channels, positions, channels_last != 0, itemsize, backward != 0,
                                                      {max_blocks, min_blocks, tile_bytes});
  int64_t numel = batch * channels * positions;
  channels_last ? visit_steps<true>(b, out, out + numel, out + 2 * numel) : visit_steps<false>(b, out, out + numel, out + 2 * numel);
}

EXPORT void emulated_screen_grid(int64_t heads, int64_t rows, int64_t codes, int64_t dim, int64_t* out) {
  fastvae::CodebookLayout layout = fastvae::codebook_layout(codes, dim);
  fastvae::CodebookScreenGrid grid = fastvae::screen_grid(heads, rows, layout);
  out[0] = grid.tile_rows;
  out[1] = grid.tiles;
  out[2] = grid.splits;
  out[3] = grid.codes_per_split;
  out[4] = layout.padded_codes;
}

EXPORT void emulated_code_layout(int64_t codes, int64_t dim, int64_t* out) {
  fastvae::CodebookLayout layout = fastvae::codebook_layout(codes, dim);
  out[0] = layout.padded_codes;
  out[1] = layout.padded_dim;
  out[2] = layout.slots;
}

EXPORT void emulated_code_element(int64_t codes, int64_t dim, int64_t code, int64_t d, int64_t* out) {
  out[0] = fastvae::code_element(fastvae::codebook_layout(codes, dim), code, d);
}

EXPORT void emulated_sort_parts(int64_t rows, int64_t* out) {
  fastvae::CodebookSortParts parts = fastvae::sort_parts(rows);
  out[0] = parts.rows_per_part;
  out[1] = parts.parts;
}

EXPORT void emulated_crosses_pieces(int64_t start, int64_t end, int64_t* out) { out[0] = fastvae::crosses_pieces(start, end); }

EXPORT void emulated_piece_slot(int64_t piece, int64_t start, int64_t* out) { out[0] = fastvae::piece_slot(piece, start); }

// Finds the two codes with the smallest of `count` scores. Score i is one of those of thread i % threads.
EXPORT void emulated_best(const float* scores, int64_t count, int64_t threads, float* out) {
  std::vector<fastvae::TwoSmallest> seen(threads, fastvae::no_scores());
  for (int64_t i = 0; i < count; ++i) fastvae::insert_score(seen[i % threads], scores[i], static_cast<int32_t>(i));
  fastvae::NearestTwo best = fastvae::nearest_two(fastvae::no_scores());
  for (const fastvae::TwoSmallest& scores_of_thread : seen) fastvae::merge_nearest(best, fastvae::nearest_two(scores_of_thread));
  out[0] = best.smallest;
  out[1] = best.second;
  out[2] = best.rest;
  out[3] = static_cast<float>(best.code);
  out[4] = static_cast<float>(best.second_code);
}

// The tickets of the current stream's workspace that are not 0, between two operators.
EXPORT int64_t emulated_open_tickets() {
  fastvae::Tensor owner;
  fastvae::Workspace workspace;
  {
    // The end of the guard runs what is queued, which clears the workspace of a captured call.
    torch::stable::accelerator::DeviceGuard guard(0);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(0, &stream));
    workspace = fastvae::workspace_of(0, stream, &owner);
  }
  return fastvae::kTickets - std::count(workspace.tickets, workspace.tickets + fastvae::kTickets, 0u);
}
