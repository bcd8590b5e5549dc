// Attention of N queries to M keys, forward and backward: heads and blocks of queries or keys are
// shared among threads.
#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "row_sums.h"

namespace vqkernels {
namespace {

// What a thread takes at least, and where queries and keys are cut: fixed, so that sums come out
// the same whatever the number of threads.
constexpr int64_t kWorthThread = 1 << 20;  // multiply-adds
constexpr int64_t kQueriesEach = 192;      // a multiple of a tile's rows
constexpr int64_t kKeysEach = 512;
constexpr int64_t kTasksEnough = 16;

int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tensor `[B, H, N, d]`, asked once for what every head needs.
struct Heads {
  Heads() = default;
  explicit Heads(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        batch_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)),
        row_stride(tensor.stride(2)) {
    const ScalarType type = tensor.scalar_type();
    bytes = type == ScalarType::Bool ? 1 : type == ScalarType::Float ? 4 : 2;
  }

  HeadRows of(int64_t batch, int64_t head) const {
    return {data + (batch * batch_stride + head * head_stride) * bytes, row_stride};
  }

  char* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, bytes = 0;
};

// As reference.like_queries: heads lie beside each other in memory where q has them so.
Tensor like_queries(const Tensor& q, int64_t columns) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  if (q.stride(1) >= q.stride(2))
    return empty({batch, heads, queries, columns}, q.scalar_type(), q);
  return torch::stable::transpose(empty({batch, queries, heads, columns}, q.scalar_type(), q), 1,
                                  2);
}

// The arguments that forward and backward share, with rows that lie in one piece.
struct Call {
  Call(const Tensor& q_given, const Tensor& k_given, const Tensor& v_given,
       const std::optional<Tensor>& attn_mask, bool causal, double scale)
      : q(dense_rows(q_given)),
        k(dense_rows(k_given)),
        v(dense_rows(v_given)),
        q_heads(q),
        k_heads(k),
        v_heads(v),
        batches(q.size(0)),
        heads(q.size(1)),
        key_heads(k.size(1)),
        group(heads / std::max<int64_t>(1, key_heads)) {
    common.dtype = dtype_of(q);
    common.queries = q.size(2);
    common.keys = k.size(2);
    common.dim = q.size(3);
    common.value_dim = v.size(3);
    common.scale = float(scale);
    common.causal = causal;
    if (!attn_mask) return;
    mask = Heads(*attn_mask);
    common.mask_kind = mask.bytes == 1 ? MaskKind::boolean : MaskKind::additive;
    common.mask_row = attn_mask->stride(2);
    common.mask_col = attn_mask->stride(3);
  }

  AttentionTask of(int64_t batch, int64_t head, const Heads& out, float* lse) const {
    AttentionTask task = common;
    task.q = q_heads.of(batch, head);
    task.k = k_heads.of(batch, head / group);
    task.v = v_heads.of(batch, head / group);
    task.out = out.of(batch, head);
    task.lse = lse + (batch * heads + head) * task.queries;
    task.mask = mask.of(batch, head).data;
    task.query_end = task.queries;
    return task;
  }

  Tensor q, k, v;
  Heads q_heads, k_heads, v_heads, mask;
  int64_t batches, heads, key_heads, group;
  AttentionTask common;
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& attn_mask, bool is_causal,
                                     double scale) {
  const Call call(q, k, v, attn_mask, is_causal, scale);
  Tensor out = like_queries(q, v.size(3));
  Tensor lse = empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float, q);
  float* const logs = data<float>(lse);
  const Heads outs(out);
  const AttentionTask& common = call.common;
  const int64_t heads = call.batches * call.heads;
  const int64_t pieces = heads >= kTasksEnough ? 1 : cdiv(common.queries, kQueriesEach);
  const int64_t each = pieces <= 1 ? common.queries : kQueriesEach;
  const int64_t work = each * common.keys * (common.dim + common.value_dim);
  parallel(heads * pieces, std::max<int64_t>(1, kWorthThread / std::max<int64_t>(1, work)),
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               const int64_t head = i / pieces;
               AttentionTask task = call.of(head / call.heads, head % call.heads, outs, logs);
               task.query_begin = i % pieces * each;
               task.query_end = std::min(task.query_begin + each, task.queries);
               kernels().attention(task);
             }
           });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_given, const Tensor& q,
                                                      const Tensor& k, const Tensor& v,
                                                      const Tensor& out_given,
                                                      const Tensor& lse_given,
                                                      const std::optional<Tensor>& attn_mask,
                                                      bool is_causal, double scale) {
  const Call call(q, k, v, attn_mask, is_causal, scale);
  const Tensor grad = dense_rows(grad_given), out = dense_rows(out_given), lse = dense(lse_given);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k);
  Tensor dv = torch::stable::empty_like(v);
  const AttentionTask& common = call.common;
  const int64_t key_heads = call.batches * call.key_heads, group = call.group;
  if (key_heads * common.queries * common.keys == 0) {
    for (Tensor* empty : {&dq, &dk, &dv}) torch::stable::zero_(*empty);
    return {dq, dk, dv};
  }
  // Rows of results that do not lie in one piece are written to copies.
  const auto writable = [](const Tensor& t) {
    return t.size(3) < 2 || t.stride(3) == 1
               ? t
               : empty({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type(), t);
  };
  const Tensor to_q = writable(dq), to_k = writable(dk), to_v = writable(dv);
  const Heads dq_heads(to_q), dk_heads(to_k), dv_heads(to_v), outs(out), grads_of(grad);
  float* const logs = data<float>(lse);
  const int64_t wanted = std::max<int64_t>(1, kTasksEnough / key_heads);
  const int64_t each =
      cdiv(cdiv(common.keys, std::min(wanted, cdiv(common.keys, kKeysEach))), 128) * 128;
  const int64_t pieces = cdiv(common.keys, each);
  const int64_t head_numbers = common.queries * common.dim, numbers = group * head_numbers;
  const std::unique_ptr<float[]> parts(new float[size_t(pieces * key_heads * numbers)]);
  const int64_t work = 5 * group * common.queries * each * (common.dim + common.value_dim) / 2;
  parallel(key_heads * pieces, std::max<int64_t>(1, kWorthThread / std::max<int64_t>(1, work)),
           [&](int64_t begin, int64_t end) {
             std::vector<AttentionTask> heads(static_cast<size_t>(group));
             std::vector<HeadRows> grads(static_cast<size_t>(group));
             for (int64_t i = begin; i < end; ++i) {
               const int64_t batch = i / pieces / call.key_heads;
               const int64_t key_head = i / pieces % call.key_heads, piece = i % pieces;
               for (int64_t j = 0; j < group; ++j) {
                 const int64_t head = key_head * group + j;
                 heads[size_t(j)] = call.of(batch, head, outs, logs);
                 grads[size_t(j)] = grads_of.of(batch, head);
               }
               AttentionBackwardTask task;
               task.heads = heads.data();
               task.grads = grads.data();
               task.count = group;
               task.key_begin = piece * each;
               task.key_end = std::min(task.key_begin + each, common.keys);
               task.dk = dk_heads.of(batch, key_head);
               task.dv = dv_heads.of(batch, key_head);
               task.dq = parts.get() + (piece * key_heads + i / pieces) * numbers;
               kernels().attention_backward(task);
             }
           });
  const int64_t row_sums = pieces * head_numbers;
  parallel(key_heads * group, grain(row_sums), [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      AttentionQuerySums sums;
      sums.dtype = common.dtype;
      sums.parts = parts.get() + head * head_numbers;
      sums.count = pieces;
      sums.apart = key_heads * numbers;
      sums.queries = common.queries;
      sums.dim = common.dim;
      sums.dq = dq_heads.of(head / call.heads, head % call.heads);
      kernels().attention_query_sums(sums);
    }
  });
  const auto deliver = [](Tensor& to, const Tensor& from) {
    if (to.data_ptr() != from.data_ptr()) torch::stable::copy_(to, from);
  };
  deliver(dq, to_q);
  deliver(dk, to_k);
  deliver(dv, to_v);
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace
}  // namespace vqkernels
