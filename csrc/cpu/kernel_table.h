// The kernels of one instruction set, behind one C symbol. Every `libvqkernels_cpu_<set>` exports
// `vqkernels_kernel_table`; the ops object opens the best one this processor can run.
#pragma once

#include <cstdint>

#include "attention_task.h"
#include "modulation_task.h"
#include "noise_task.h"
#include "packed_book.h"
#include "qk_norm_rope_task.h"
#include "rows.h"

namespace vqkernels {

enum class Metric : int32_t { l2 = 0, dot = 1, cosine = 2 };

// How a search scores codes before it decides in float64: all in fp32, all in int8, or in fp32
// those that a tree of boxes leaves.
enum class Screen : int32_t { fp32 = 0, int8 = 1, tree = 2 };

// How the gradient of a quantized row reaches its x.
enum class Gradient : int32_t { none = 0, straight_through = 1, rotation = 2 };

struct Codebook {
  Rows codes;
  Metric metric = Metric::l2;
};

struct NearestTask {
  Rows x;
  Codebook book;
  const float* frame = nullptr;   // what `choose_frame` wrote: the start of a packed book
  const float* packed = nullptr;  // the packed book, or null to pack blocks in passing (fp32)
  Screen screen = Screen::fp32;
  int64_t row_begin = 0, row_end = 0;
  int64_t panel_begin = 0, panel_end = 0;
};

// One EMA step of one book: what it reads and what it writes, [K] or [K, D] each.
struct EmaStep {
  const float *cluster_size, *embed_sum, *counts, *sums;
  float *new_codebook, *new_cluster_size, *new_embed_sum;
  int64_t codebook_size, width;
  float decay;
  double eps;
};

struct KernelTable {
  int32_t version;
  const char* name;
  int32_t panel_width;  // codes a panel
  int32_t tile_rows;    // rows a tile
  bool int8_screen;     // whether Screen::int8 is served

  void (*choose_frame)(const Codebook& book, float* frame);
  void (*pack_panels)(const Codebook& book, Screen screen, int64_t panel_begin, int64_t panel_end,
                      float* packed);
  void (*pack_tree)(const Codebook& book, float* packed);
  // Hides every code that repeats an earlier one bit by bit: it could never be the lowest index.
  void (*hide_duplicates)(const Codebook& book, Screen screen, float* packed);
  // Smallest score (in float64) and its code for each row over the task's panels, at
  // [row - row_begin]; returns how many codes a screen left to look at more closely.
  int64_t (*nearest_code)(const NearestTask& task, double* score, int64_t* index);

  // Both return the number of indices outside [-1, K - 1]; such rows become zeros.
  int64_t (*gather_codes)(const Rows& codes, const int64_t* indices, const Rows& out,
                          int64_t row_begin, int64_t row_end);
  int64_t (*code_counts)(const int64_t* indices, const float* weights, int64_t rows,
                         int64_t codebook_size, float* counts);
  // sums += weight * (subtract_from ? code - x : x), for columns [col_begin, col_end).
  void (*code_sums)(const Rows& x, const int64_t* indices, const float* weights,
                    const Rows* subtract_from, int64_t codebook_size, int64_t col_begin,
                    int64_t col_end, float* sums);

  // Writes the chosen code of each row and returns the sum of (x - code)^2 over the rows.
  double (*quantize_rows)(const Rows& x, const Rows& codes, const int64_t* indices,
                          const bool* kept, const Rows& out, int64_t row_begin, int64_t row_end);
  void (*quantize_backward_x)(const Rows& x, const Rows& codes, const int64_t* indices,
                              const Rows* grad_quantized, Gradient gradient, float loss_scale,
                              const Rows& grad_x, int64_t row_begin, int64_t row_end);

  double (*ema_sizes)(const EmaStep& step, int64_t code_begin, int64_t code_end);
  void (*ema_codes)(const EmaStep& step, double total, int64_t code_begin, int64_t code_end);

  void (*timestep_embedding)(const float* t, const double* frequencies, int64_t dim, int64_t begin,
                             int64_t end, float* out);

  void (*ada_layer_norm)(const ModulatedNorm& task, int64_t row_begin, int64_t row_end);
  void (*ada_layer_norm_backward)(const ModulatedNormBackward& task, int64_t chunk_begin,
                                  int64_t chunk_end);
  void (*gated_residual)(const GatedResidual& task, int64_t row_begin, int64_t row_end);
  void (*gated_residual_backward)(const GatedResidualBackward& task, int64_t chunk_begin,
                                  int64_t chunk_end);
  void (*modulation_sums)(const ModulationSums& task, int64_t col_begin, int64_t col_end);
  void (*bias_gelu)(const BiasGelu& task, int64_t row_begin, int64_t row_end);
  void (*bias_gelu_backward)(const BiasGeluBackward& task, int64_t chunk_begin, int64_t chunk_end);

  void (*attention)(const AttentionTask& task);
  void (*attention_backward)(const AttentionBackwardTask& task);
  void (*attention_query_sums)(const AttentionQuerySums& task);

  void (*qk_norm_rope)(const NormRope& task, int64_t chunk_begin, int64_t chunk_end);
  void (*qk_norm_rope_backward)(const NormRope& task, int64_t chunk_begin, int64_t chunk_end);

  void (*normal_noise)(const NormalNoise& task, int64_t block_begin, int64_t block_end);
  void (*diffuse)(const Diffuse& task, int64_t block_begin, int64_t block_end);
  void (*diffusion_loss)(const DiffusionLoss& task, int64_t chunk_begin, int64_t chunk_end);
  void (*diffusion_loss_backward)(const DiffusionLoss& task, int64_t block_begin,
                                  int64_t block_end);
  // Of blocks, or of samples where the task keeps these whole.
  void (*denoise_step)(const DenoiseStep& task, int64_t begin, int64_t end);
};

// A hash of these headers, from the build: objects of different builds refuse each other.
#if !defined(VQKERNELS_TABLE_VERSION)
#define VQKERNELS_TABLE_VERSION 0
#endif
constexpr int32_t kKernelTableVersion = VQKERNELS_TABLE_VERSION;

}  // namespace vqkernels

extern "C" const vqkernels::KernelTable* vqkernels_kernel_table();
