// Attention of N queries to M keys, forward and backward, of samples of one length or of varying
// ones: sequences, heads and blocks of queries or keys are shared among threads.
#include <algorithm>
#include <cmath>
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

// Queries that attend to keys of their own: a sample of `[B, H, N, d]`, or a stretch of the rows of
// `[T, H, d]`.
struct Sequence {
  int64_t queries = 0, keys = 0;
  int64_t query_at = 0, key_at = 0;  // the sample's number, or the first row's
  int64_t lse_at = 0;                // where the logarithms of the first head start
};

// A tensor of heads, asked once for what every head needs.
struct Heads {
  Heads() = default;
  explicit Heads(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        sequence_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)),
        row_stride(tensor.stride(tensor.dim() == 3 ? 0 : 2)) {
    const ScalarType type = tensor.scalar_type();
    bytes = type == ScalarType::Bool ? 1 : type == ScalarType::Float ? 4 : 2;
  }

  HeadRows of(int64_t at, int64_t head) const {
    return {data + (at * sequence_stride + head * head_stride) * bytes, row_stride};
  }

  char* data = nullptr;
  int64_t sequence_stride = 0, head_stride = 0, row_stride = 0, bytes = 0;
};

// As reference.like_queries: heads lie beside each other in memory where q has them so.
Tensor like_queries(const Tensor& q, int64_t columns) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  if (q.stride(1) >= q.stride(2))
    return empty({batch, heads, queries, columns}, q.scalar_type(), q);
  return torch::stable::transpose(empty({batch, queries, heads, columns}, q.scalar_type(), q), 1,
                                  2);
}

std::vector<Sequence> samples_of(const Tensor& q, const Tensor& k) {
  std::vector<Sequence> samples(static_cast<size_t>(q.size(0)));
  for (int64_t i = 0; i < q.size(0); ++i) {
    samples[size_t(i)] = {q.size(2), k.size(2), i, i, i * q.size(1) * q.size(2)};
  }
  return samples;
}

// Throws unless `starts` is int32 and rises from 0 to `rows`: kernels trust it.
std::vector<int64_t> checked_starts(const char* name, const Tensor& starts, int64_t rows) {
  const auto refuse = [&](const char* why) {
    throw std::invalid_argument(std::string(name) + " must " + why);
  };
  if (starts.scalar_type() != ScalarType::Int || starts.dim() != 1 || starts.numel() == 0)
    refuse("be int32 [B + 1]");
  const Tensor rows_of_numbers = dense(starts);
  const int32_t* const numbers = data<int32_t>(rows_of_numbers);
  std::vector<int64_t> found(numbers, numbers + starts.numel());
  if (found.front() != 0 || found.back() != rows || !std::is_sorted(found.begin(), found.end()))
    refuse("rise from 0 to the number of rows");
  return found;
}

std::vector<Sequence> sequences_of(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k) {
  const auto queries = checked_starts("cu_seqlens_q", cu_seqlens_q, q.size(0));
  const auto keys = checked_starts("cu_seqlens_k", cu_seqlens_k, k.size(0));
  if (queries.size() != keys.size())
    throw std::invalid_argument("cu_seqlens_q and cu_seqlens_k must be as many");
  std::vector<Sequence> sequences(queries.size() - 1);
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i] = {queries[i + 1] - queries[i], keys[i + 1] - keys[i], queries[i], keys[i],
                    queries[i]};
  }
  return sequences;
}

// The arguments that forward and backward share, with rows that lie in one piece.
struct Call {
  Call(const Tensor& q_given, const Tensor& k_given, const Tensor& v_given,
       std::vector<Sequence> sequences_given, bool causal, double scale)
      : q(dense_rows(q_given)),
        k(dense_rows(k_given)),
        v(dense_rows(v_given)),
        q_heads(q),
        k_heads(k),
        v_heads(v),
        heads(q.size(1)),
        key_heads(k.size(1)),
        group(heads / std::max<int64_t>(1, key_heads)),
        lse_stride(q.size(q.dim() == 3 ? 0 : 2)),
        sequences(std::move(sequences_given)) {
    common.dtype = dtype_of(q);
    common.dim = q.size(q.dim() - 1);
    common.value_dim = v.size(v.dim() - 1);
    common.scale = float(scale);
    common.causal = causal;
    for (const Sequence& sequence : sequences) {
      largest = std::max(largest, sequence.queries * sequence.keys);
      scores += sequence.queries * sequence.keys;
    }
  }

  Call& dropping(double probability, const std::optional<Tensor>& seed) {
    common.drop_below = uint32_t(std::lround(probability * 65536));
    if (common.drop_below == 0) return *this;
    common.kept_factor = float(1 / (1 - common.drop_below / 65536.0));
    common.seed = uint64_t(*data<int64_t>(*seed));
    return *this;
  }

  Call& with(const std::optional<Tensor>& attn_mask) {
    if (!attn_mask) return *this;
    mask = Heads(*attn_mask);
    common.mask_kind = mask.bytes == 1 ? MaskKind::boolean : MaskKind::additive;
    common.mask_row = attn_mask->stride(2);
    common.mask_col = attn_mask->stride(3);
    return *this;
  }

  AttentionTask of(const Sequence& sequence, int64_t head, const Heads& out, float* lse) const {
    AttentionTask task = common;
    task.queries = sequence.queries;
    task.keys = sequence.keys;
    task.q = q_heads.of(sequence.query_at, head);
    task.k = k_heads.of(sequence.key_at, head / group);
    task.v = v_heads.of(sequence.key_at, head / group);
    task.out = out.of(sequence.query_at, head);
    task.lse = lse + sequence.lse_at + head * lse_stride;
    task.mask = mask.of(sequence.query_at, head).data;
    task.query_end = task.queries;
    task.head_number = uint32_t((&sequence - sequences.data()) * heads + head);
    return task;
  }

  // As how many heads of the largest sequence all of them count.
  int64_t whole_heads(int64_t of_each) const {
    const int64_t most = std::max<int64_t>(1, largest);
    return scores / most * of_each + scores % most * of_each / most;
  }

  // Calls f(number of a sequence, head). Threads share what follows one another: a head of every
  // sequence, where those differ.
  template <typename F>
  void each_head(int64_t of_each, const F& f) const {
    const int64_t count = int64_t(sequences.size());
    for (int64_t i = 0; i < count * of_each; ++i) {
      if (q.dim() == 3) {
        f(size_t(i % count), i / count);
      } else {
        f(size_t(i / of_each), i % of_each);
      }
    }
  }

  // How many of `tasks` are worth a thread, with `products` as large as q k^T or p v in all.
  int64_t tasks_each(int64_t tasks, int64_t products) const {
    const int64_t work = scores * heads * (common.dim + common.value_dim) * products / 2;
    return std::max<int64_t>(
        1, kWorthThread / std::max<int64_t>(1, work / std::max<int64_t>(1, tasks)));
  }

  Tensor q, k, v;
  Heads q_heads, k_heads, v_heads, mask;
  int64_t heads, key_heads, group, lse_stride;
  std::vector<Sequence> sequences;
  int64_t largest = 0, scores = 0;
  AttentionTask common;
};

// Some queries, or keys, of one head.
struct Piece {
  size_t sequence;
  int64_t head, begin, end;
  int64_t dq_at = 0;  // where its part of dq goes
};

void forward(const Call& call, const Tensor& out, const Tensor& lse) {
  float* const logs = data<float>(lse);
  const Heads outs(out);
  const bool whole = call.whole_heads(call.heads) >= kTasksEnough;
  std::vector<Piece> pieces;
  call.each_head(call.heads, [&](size_t sequence, int64_t head) {
    const int64_t queries = call.sequences[sequence].queries, each = whole ? queries : kQueriesEach;
    for (int64_t begin = 0; begin < queries; begin += each) {
      pieces.push_back({sequence, head, begin, std::min(begin + each, queries)});
    }
  });
  const int64_t count = int64_t(pieces.size());
  parallel(count, call.tasks_each(count, 2), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[size_t(i)];
      AttentionTask task = call.of(call.sequences[piece.sequence], piece.head, outs, logs);
      task.query_begin = piece.begin;
      task.query_end = piece.end;
      kernels().attention(task);
    }
  });
}

// Keys of one head are cut only where heads are few: each piece keeps a dq of its own.
int64_t keys_each(int64_t keys, int64_t whole_heads) {
  const int64_t wanted = std::max<int64_t>(1, kTasksEnough / std::max<int64_t>(1, whole_heads));
  return cdiv(cdiv(keys, std::min(wanted, cdiv(keys, kKeysEach))), 128) * 128;
}

// Writes the gradients to dq, dk and dv, of any strides.
void write_gradients(const Call& call, const Tensor& grad_given, const Tensor& out_given,
                     const Tensor& lse_given, Tensor dq, Tensor dk, Tensor dv) {
  const Tensor grad = dense_rows(grad_given), out = dense_rows(out_given), lse = dense(lse_given);
  const AttentionTask& common = call.common;
  std::vector<Piece> pieces;
  std::vector<AttentionQuerySums> sums(call.sequences.size());  // of the first head, `parts` unset
  std::vector<int64_t> sums_at(call.sequences.size());
  int64_t numbers = 0;
  bool empty_ones = call.sequences.empty();
  for (size_t i = 0; i < call.sequences.size(); ++i) {
    const Sequence& sequence = call.sequences[i];
    if (sequence.queries * sequence.keys == 0) {
      empty_ones = true;
      continue;
    }
    sums[i].dtype = common.dtype;
    sums[i].queries = sequence.queries;
    sums[i].dim = common.dim;
    sums[i].count = cdiv(sequence.keys, keys_each(sequence.keys, call.whole_heads(call.key_heads)));
    sums[i].apart = call.heads * sequence.queries * common.dim;
    sums_at[i] = numbers;
    numbers += sums[i].count * sums[i].apart;
  }
  if (empty_ones) {
    for (Tensor* some : {&dq, &dk, &dv}) torch::stable::zero_(*some);
  }
  if (call.scores * call.key_heads == 0) return;
  // Rows of results that do not lie in one piece are written to copies.
  const auto writable = [](const Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (t.size(last) < 2 || t.stride(last) == 1) return t;
    return torch::stable::contiguous(t);
  };
  const Tensor to_q = writable(dq), to_k = writable(dk), to_v = writable(dv);
  const Heads dq_heads(to_q), dk_heads(to_k), dv_heads(to_v), outs(out), grads_of(grad);
  float* const logs = data<float>(lse);
  const std::unique_ptr<float[]> parts(new float[size_t(numbers)]);
  call.each_head(call.key_heads, [&](size_t i, int64_t key_head) {
    const Sequence& sequence = call.sequences[i];
    if (sums[i].count == 0) return;
    const int64_t each = keys_each(sequence.keys, call.whole_heads(call.key_heads));
    int64_t at = sums_at[i] + key_head * call.group * sequence.queries * common.dim;
    for (int64_t begin = 0; begin < sequence.keys; begin += each, at += sums[i].apart) {
      pieces.push_back({i, key_head, begin, std::min(begin + each, sequence.keys), at});
    }
  });
  const int64_t count = int64_t(pieces.size());
  parallel(count, call.tasks_each(count, 5), [&](int64_t begin, int64_t end) {
    std::vector<AttentionTask> heads(static_cast<size_t>(call.group));
    std::vector<HeadRows> grads(static_cast<size_t>(call.group));
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[size_t(i)];
      const Sequence& sequence = call.sequences[piece.sequence];
      for (int64_t j = 0; j < call.group; ++j) {
        const int64_t head = piece.head * call.group + j;
        heads[size_t(j)] = call.of(sequence, head, outs, logs);
        grads[size_t(j)] = grads_of.of(sequence.query_at, head);
      }
      AttentionBackwardTask task;
      task.heads = heads.data();
      task.grads = grads.data();
      task.count = call.group;
      task.key_begin = piece.begin;
      task.key_end = piece.end;
      task.dk = dk_heads.of(sequence.key_at, piece.head);
      task.dv = dv_heads.of(sequence.key_at, piece.head);
      task.dq = parts.get() + piece.dq_at;
      kernels().attention_backward(task);
    }
  });
  const int64_t all = int64_t(call.sequences.size()) * call.heads;
  parallel(all, grain(numbers / all), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t sequence = size_t(i / call.heads);
      AttentionQuerySums task = sums[sequence];
      if (task.count == 0) continue;
      const int64_t head = i % call.heads;
      task.parts = parts.get() + sums_at[sequence] + head * task.queries * task.dim;
      task.dq = dq_heads.of(call.sequences[sequence].query_at, head);
      kernels().attention_query_sums(task);
    }
  });
  const auto deliver = [](Tensor& to, const Tensor& from) {
    if (to.data_ptr() != from.data_ptr()) torch::stable::copy_(to, from);
  };
  deliver(dq, to_q);
  deliver(dk, to_k);
  deliver(dv, to_v);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Call& call, const Tensor& grad, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse) {
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k);
  Tensor dv = torch::stable::empty_like(v);
  write_gradients(call, grad, out, lse, dq, dk, dv);
  return {dq, dk, dv};
}

// q, k or v of a packed `[B, N, 3, H, d]`, as `[B, H, N, d]`.
Tensor heads_of(const Tensor& qkv, int64_t which) {
  return torch::stable::transpose(torch::stable::select(qkv, 2, which), 1, 2);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& attn_mask, bool is_causal,
                                     double scale, double dropout_p,
                                     const std::optional<Tensor>& seed) {
  Call call(q, k, v, samples_of(q, k), is_causal, scale);
  Tensor out = like_queries(q, v.size(3));
  Tensor lse = empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float, q);
  forward(call.with(attn_mask).dropping(dropout_p, seed), out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const std::optional<Tensor>& attn_mask, bool is_causal, double scale,
    double dropout_p, const std::optional<Tensor>& seed) {
  Call call(q, k, v, samples_of(q, k), is_causal, scale);
  return backward(call.with(attn_mask).dropping(dropout_p, seed), grad, q, k, v, out, lse);
}

Tensor attention_qkvpacked_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out,
                                    const Tensor& lse, const std::optional<Tensor>& attn_mask,
                                    bool is_causal, double scale, double dropout_p,
                                    const std::optional<Tensor>& seed) {
  const Tensor q = heads_of(qkv, 0), k = heads_of(qkv, 1), v = heads_of(qkv, 2);
  Call call(q, k, v, samples_of(q, k), is_causal, scale);
  const Tensor dqkv = empty(qkv.sizes(), qkv.scalar_type(), qkv);
  write_gradients(call.with(attn_mask).dropping(dropout_p, seed),
                  torch::stable::transpose(grad, 1, 2), torch::stable::transpose(out, 1, 2), lse,
                  heads_of(dqkv, 0), heads_of(dqkv, 1), heads_of(dqkv, 2));
  return dqkv;
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            int64_t, int64_t, bool is_causal, double scale,
                                            double dropout_p, const std::optional<Tensor>& seed) {
  Call call(q, k, v, sequences_of(q, k, cu_seqlens_q, cu_seqlens_k), is_causal, scale);
  Tensor out = empty({q.size(0), q.size(1), v.size(2)}, q.scalar_type(), q);
  Tensor lse = empty({q.size(1), q.size(0)}, ScalarType::Float, q);
  forward(call.dropping(dropout_p, seed), out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t, int64_t,
    bool is_causal, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  Call call(q, k, v, sequences_of(q, k, cu_seqlens_q, cu_seqlens_k), is_causal, scale);
  return backward(call.dropping(dropout_p, seed), grad, q, k, v, out, lse);
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_qkvpacked_backward", TORCH_BOX(&attention_qkvpacked_backward));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward));
}

}  // namespace
}  // namespace vqkernels
