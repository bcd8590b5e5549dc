#include "tensors.h"

namespace vqkernels {

Rows rows_of(const Tensor& tensor, std::optional<int64_t> group) {
  const int64_t dims = tensor.dim();
  Rows rows;
  rows.dtype = dtype_of(tensor);
  rows.width = tensor.size(dims - 1);
  rows.col_stride = tensor.stride(dims - 1);
  int64_t start = 0;
  rows.count = 1;
  for (int64_t d = 0; d < dims - 1; ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (group && d == dims - 3) {
      start = *group * stride;
      continue;
    }
    rows.count *= size;
    if (size == 1) continue;
    if (rows.rank > 0 && rows.strides[rows.rank - 1] == size * stride) {
      rows.sizes[rows.rank - 1] *= size;
      rows.strides[rows.rank - 1] = stride;
      continue;
    }
    rows.sizes[rows.rank] = size;
    rows.strides[rows.rank++] = stride;
  }
  const int64_t element = rows.dtype == DType::f32 ? 4 : 2;
  rows.data = static_cast<char*>(tensor.data_ptr()) + start * element;
  return rows;
}

}  // namespace vqkernels
