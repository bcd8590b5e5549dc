// Development module: the raw kernels of every instruction set, on NumPy arrays.
// Tests use it to run each table on this processor without torch between them and the kernel.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernel_table.h"

namespace py = pybind11;

namespace vqkernels {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Halves = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;
using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// fp16 and bf16 arrays travel as uint16 bits.
Rows rows_of(const py::array& array, const std::string& dtype) {
  if (array.ndim() != 2) throw std::invalid_argument("rows must be [N, D]");
  Rows rows;
  rows.dtype = dtype == "float32" ? DType::f32 : dtype == "float16" ? DType::f16 : DType::bf16;
  const int64_t element = rows.dtype == DType::f32 ? 4 : 2;
  if (array.itemsize() != element) throw std::invalid_argument("array does not hold " + dtype);
  rows.data = const_cast<void*>(array.data());
  rows.count = array.shape(0);
  rows.width = array.shape(1);
  rows.col_stride = array.strides(1) / element;
  rows.rank = 1;
  rows.sizes[0] = rows.count;
  rows.strides[0] = array.strides(0) / element;
  return rows;
}

class Table {
 public:
  explicit Table(const std::string& path) {
    void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (object == nullptr) throw std::runtime_error(dlerror());
    using Entry = const KernelTable* (*)();
    const auto entry = reinterpret_cast<Entry>(dlsym(object, "vqkernels_kernel_table"));
    if (entry == nullptr) throw std::runtime_error(path + " exports no kernel table");
    table_ = entry();
    if (table_->version != kKernelTableVersion) {
      throw std::runtime_error(path + " belongs to another build of vqkernels");
    }
  }

  std::string name() const { return table_->name; }

  bool int8_screen() const { return table_->int8_screen; }

  py::array_t<float> pack_codebook(const py::array& codebook, const std::string& dtype, int metric,
                                   int screen) const {
    const Codebook book{rows_of(codebook, dtype), Metric(metric)};
    py::array_t<float> packed(PackedLayout(book.codes.count, book.codes.width).words);
    std::fill(packed.mutable_data(), packed.mutable_data() + packed.size(), 0.0f);
    table_->choose_frame(book, packed.mutable_data());
    if (Screen(screen) == Screen::tree) {
      table_->pack_tree(book, packed.mutable_data());
      return packed;
    }
    table_->pack_panels(book, Screen(screen), 0, panels(book), packed.mutable_data());
    table_->hide_duplicates(book, Screen(screen), packed.mutable_data());
    return packed;
  }

  // With `packed`, searches it; without, packs block by block as the search goes (fp32).
  py::array_t<int64_t> nearest_code(const py::array& x, const std::string& x_dtype,
                                    const py::array& codebook, const std::string& codebook_dtype,
                                    int metric, const std::optional<Floats>& packed,
                                    int screen) const {
    NearestTask task;
    task.x = rows_of(x, x_dtype);
    task.book = {rows_of(codebook, codebook_dtype), Metric(metric)};
    task.screen = Screen(screen);
    std::vector<float> frame(PackedLayout(0, task.x.width).frame_words);
    if (packed) {
      task.frame = task.packed = packed->data();
    } else {
      table_->choose_frame(task.book, frame.data());
      task.frame = frame.data();
    }
    task.row_end = task.x.count;
    task.panel_end = panels(task.book);
    std::vector<double> score(task.x.count);
    py::array_t<int64_t> index(task.x.count);
    py::gil_scoped_release unlocked;
    table_->nearest_code(task, score.data(), index.mutable_data());
    return index;
  }

  py::array_t<float> code_sums(const py::array& x, const std::string& dtype, const Indices& indices,
                               int64_t codebook_size) const {
    const Rows rows = rows_of(x, dtype);
    py::array_t<float> sums({codebook_size, rows.width});
    std::fill(sums.mutable_data(), sums.mutable_data() + sums.size(), 0.0f);
    table_->code_sums(rows, indices.data(), nullptr, nullptr, codebook_size, 0, rows.width,
                      sums.mutable_data());
    return sums;
  }

  py::tuple quantize_rows(const py::array& x, const std::string& x_dtype, const py::array& codebook,
                          const std::string& codebook_dtype, const Indices& indices) const {
    const Rows rows = rows_of(x, x_dtype), codes = rows_of(codebook, codebook_dtype);
    py::array out = rows.dtype == DType::f32 ? py::array(Floats({rows.count, rows.width}))
                                             : py::array(Halves({rows.count, rows.width}));
    const double sum = table_->quantize_rows(rows, codes, indices.data(), nullptr,
                                             rows_of(out, x_dtype), 0, rows.count);
    return py::make_tuple(out, sum);
  }

 private:
  int64_t panels(const Codebook& book) const {
    return (book.codes.count + table_->panel_width - 1) / table_->panel_width;
  }

  const KernelTable* table_;
};

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "Raw CPU kernels of one instruction set each, for tests.";
  py::class_<Table>(m, "Table")
      .def(py::init<const std::string&>(), py::arg("path"))
      .def_property_readonly("name", &Table::name)
      .def_property_readonly("int8_screen", &Table::int8_screen)
      .def("pack_codebook", &Table::pack_codebook, py::arg("codebook"), py::arg("dtype"),
           py::arg("metric"), py::arg("screen") = 0)
      .def("nearest_code", &Table::nearest_code, py::arg("x"), py::arg("x_dtype"),
           py::arg("codebook"), py::arg("codebook_dtype"), py::arg("metric"),
           py::arg("packed") = std::nullopt, py::arg("screen") = 0)
      .def("code_sums", &Table::code_sums, py::arg("x"), py::arg("dtype"), py::arg("indices"),
           py::arg("codebook_size"))
      .def("quantize_rows", &Table::quantize_rows, py::arg("x"), py::arg("x_dtype"),
           py::arg("codebook"), py::arg("codebook_dtype"), py::arg("indices"));
}

}  // namespace
}  // namespace vqkernels
