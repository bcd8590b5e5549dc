// The kernels of one instruction set, behind one C symbol. Every `libvqkernels_cpu_<set>` exports
// `vqkernels_kernel_table`; the ops object opens the best one this processor can run.
#pragma once

#include <cstdint>

#include "rows.h"

namespace vqkernels {

enum class Metric : int32_t { l2 = 0, dot = 1, cosine = 2 };

// One book: the codes as given, and their packed form where there is one.
struct Codebook {
  Rows codes;
  Metric metric = Metric::l2;
  const float* packed = nullptr;
};

struct NearestTask {
  Rows x;
  Codebook book;
  const float* frame = nullptr;  // centre and scale: kernel's `choose_frame`, or a packed header
  int64_t row_begin = 0, row_end = 0;
  int64_t panel_begin = 0, panel_end = 0;
};

struct KernelTable {
  int32_t version;
  const char* name;
  int32_t panel_width;  // codes a panel
  int32_t tile_rows;    // rows a tile

  // Packed layout: 16 header words, the centre (D rounded up to 16), then the panels, each
  // panel_width starts followed by D x panel_width code elements.
  void (*choose_frame)(const Codebook& book, float* header_and_centre);
  void (*pack_panels)(const Codebook& book, const float* frame, int64_t panel_begin,
                      int64_t panel_end, float* panels);
  // Best score and index of each row over the task's panels, at [row - row_begin].
  void (*nearest_code)(const NearestTask& task, float* score, int64_t* index);
  // Decides rows whose score says that fp32 could not: NaN, infinite or out of range.
  void (*settle_rows)(const NearestTask& task, const float* score, int64_t* index);

  // Both return the number of indices outside [-1, K - 1]; such rows become zeros.
  int64_t (*gather_codes)(const Rows& codes, const int64_t* indices, const Rows& out,
                          int64_t row_begin, int64_t row_end);
  int64_t (*code_counts)(const int64_t* indices, const float* weights, int64_t rows,
                         int64_t codebook_size, float* counts);
  // sums += weight * (subtract ? code - x : x), for columns [col_begin, col_end) of every row.
  void (*code_sums)(const Rows& x, const int64_t* indices, const float* weights,
                    const Rows* subtract_from, int64_t codebook_size, int64_t col_begin,
                    int64_t col_end, float* sums);

  // Writes the chosen code of each row and returns the sum of (x - code)^2 over the rows.
  double (*quantize_rows)(const Rows& x, const Rows& codes, const int64_t* indices,
                          const bool* kept, const Rows& out, int64_t row_begin, int64_t row_end);
  void (*quantize_backward_x)(const Rows& x, const Rows& codes, const int64_t* indices,
                              const Rows* grad_quantized, float loss_scale, const Rows& grad_x,
                              int64_t row_begin, int64_t row_end);
};

constexpr int32_t kKernelTableVersion = 1;
constexpr int64_t kHeaderWords = 16;

inline int64_t centre_words(int64_t dim) { return (dim + 15) / 16 * 16; }

inline int64_t packed_words(int64_t codebook_size, int64_t dim) {
  return kHeaderWords + centre_words(dim) + (codebook_size + 63) / 64 * 64 * (dim + 1);
}

}  // namespace vqkernels

extern "C" const vqkernels::KernelTable* vqkernels_kernel_table();
