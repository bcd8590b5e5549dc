// The table of one instruction set; the build compiles this file once for each.
#include "kernel_table.h"

#include "ada_layer_norm_backward_kernel.h"
#include "ada_layer_norm_kernel.h"
#include "attention_backward_kernel.h"
#include "bias_gelu_kernel.h"
#include "code_statistics_kernel.h"
#include "denoise_step_kernel.h"
#include "diffusion_loss_kernel.h"
#include "ema_update_kernel.h"
#include "gather_codes_kernel.h"
#include "nearest_code_kernel.h"
#include "qk_norm_rope_kernel.h"
#include "quantize_kernel.h"
#include "timestep_embedding_kernel.h"

extern "C" __attribute__((visibility("default"))) const vqkernels::KernelTable*
vqkernels_kernel_table() {
  using namespace vqkernels;
  static const KernelTable table = {
      kKernelTableVersion, VQKERNELS_CAPABILITY,
      kPanelWidth,         kTileRows,
      kInt8Screen,         choose_frame,
      pack_panels,         pack_tree,
      hide_duplicates,     nearest_code,
      gather_codes,        code_counts,
      code_sums,           quantize_rows,
      quantize_backward_x, ema_sizes,
      ema_codes,           timestep_embedding,
      ada_layer_norm,      ada_layer_norm_backward,
      gated_residual,      gated_residual_backward,
      modulation_sums,     bias_gelu,
      bias_gelu_backward,  attention,
      attention_backward,  attention_query_sums,
      qk_norm_rope,        qk_norm_rope_backward,
      normal_noise,        diffuse,
      diffusion_loss,      diffusion_loss_backward,
      denoise_step,
  };
  return &table;
}
