#include "../quantize.h"

#include <array>
#include <stdexcept>
#include <tuple>

#include "tensors.h"

namespace vqkernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_op(
    const Tensor& x, const Tensor& codebook, const std::string& metric,
    const std::optional<Tensor>& mask, const std::string& /*gradient*/,
    const std::optional<Tensor>& /*packed*/) {
  const Call call("quantize", x);
  const std::vector<int64_t> counts_shape = leading_sizes(codebook, codebook.dim() - 1);
  Tensor quantized = torch::stable::empty_like(x);
  Tensor indices = empty(leading_sizes(x, x.dim() - 1), ScalarType::Long, x);
  if (indices.numel() == 0) {
    return {quantized, indices, zeros({}, ScalarType::Float, x), zeros({}, ScalarType::Float, x),
            zeros(counts_shape, ScalarType::Float, x)};
  }
  Tensor commitment_loss = empty({}, ScalarType::Float, x);
  Tensor codebook_loss = empty({}, ScalarType::Float, x);
  Tensor counts = empty(counts_shape, ScalarType::Float, x);
  const std::optional<Tensor> kept = mask ? std::optional(dense(*mask)) : std::nullopt;

  const Grid grid = row_grid({x, quantized}, codebook.dim() == 3);
  Quantize problem;
  problem.search.x = grid.rows[0];
  problem.search.codebook = codes_of(codebook);
  problem.search.metric = parse_metric(metric);
  problem.search.labels = grid.labels;
  problem.search.indices = data<int64_t>(indices);
  problem.mask = kept ? data<uint8_t>(*kept) : nullptr;
  problem.quantized = grid.rows[1];
  problem.counts = data<float>(counts);
  problem.commitment_loss = data<float>(commitment_loss);
  problem.codebook_loss = data<float>(codebook_loss);
  quantize(problem, call.context());
  call.finish();
  return {filled(quantized, grid, 1), indices, commitment_loss, codebook_loss, counts};
}

Tensor quantize_backward_x_op(const std::optional<Tensor>& grad_quantized,
                              const std::optional<Tensor>& grad_commitment, const Tensor& x,
                              const Tensor& codebook, const Tensor& indices,
                              const std::string& gradient) {
  const Call call("quantize_backward_x", x);
  Tensor grad_x = torch::stable::empty_like(x);
  if (indices.numel() == 0) return grad_x;
  std::vector<Tensor> tensors{x, grad_x};
  if (grad_quantized) tensors.push_back(*grad_quantized);
  const Grid grid = row_grid(std::move(tensors), codebook.dim() == 3);
  const Tensor labels = dense(indices);
  QuantizeBackwardX problem;
  problem.x = grid.rows[0];
  problem.codebook = codes_of(codebook);
  if (grad_quantized) problem.grad_quantized = grid.rows[2];
  problem.grad_commitment = grad_commitment ? data<float>(*grad_commitment) : nullptr;
  problem.labels = grid.labels;
  problem.indices = data<int64_t>(labels);
  problem.gradient = gradient == "straight_through" ? Gradient::straight_through
                     : gradient == "rotation"       ? Gradient::rotation
                                                    : Gradient::none;
  problem.grad_x = grid.rows[1];
  quantize_backward_x(problem, call.context());
  call.finish();
  return filled(grad_x, grid, 1);
}

// (sorted, where each came from) of a vector, ascending; equal keys keep their order.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t(0)),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor quantize_backward_codebook_op(const Tensor& grad_codebook_loss, const Tensor& x,
                                     const Tensor& codebook, const Tensor& indices) {
  const Call call("quantize_backward_codebook", x);
  const std::vector<int64_t> shape = leading_sizes(codebook, codebook.dim());
  if (indices.numel() == 0) return zeros(shape, codebook.scalar_type(), codebook);
  Tensor grad_codebook = empty(shape, codebook.scalar_type(), codebook);
  const Grid grid = row_grid({x}, codebook.dim() == 3);
  const Rows codes = codes_of(codebook);
  if (codes.books * codes.count >= int64_t(1) << 31) {
    throw std::invalid_argument("codebook must hold fewer than 2^31 codes in all its books, got " +
                                std::to_string(codes.books * codes.count));
  }
  const Tensor labels = dense(indices);
  Tensor keys = empty({indices.numel()}, ScalarType::Int, x);
  code_keys(grid.rows[0], grid.labels, data<int64_t>(labels), codes.count, data<int32_t>(keys),
            call.context());
  call.finish();
  const auto [sorted, order] = stable_sort(keys);
  QuantizeBackwardCodebook problem;
  problem.x = grid.rows[0];
  problem.codebook = codes;
  problem.grad_codebook_loss = data<float>(grad_codebook_loss);
  problem.keys = data<int32_t>(sorted);
  problem.order = data<int64_t>(order);
  problem.grad_codebook = codes_of(grad_codebook);
  quantize_backward_codebook(problem, call.context());
  call.finish();
  return grad_codebook;
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cuda, VQKERNELS_DISPATCH_KEY, m) {
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("quantize_backward_x", TORCH_BOX(&quantize_backward_x_op));
  m.impl("quantize_backward_codebook", TORCH_BOX(&quantize_backward_codebook_op));
}

}  // namespace
}  // namespace vqkernels::cuda
