// Checks kernel tables against naive float64 loops, without torch or Python: what a C++ program
// that opens a table can rely on, and what runs under an emulator of another processor.
//
//   table_check libvqkernels_cpu_portable.so libvqkernels_cpu_neon.so
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "../cpu/kernel_table.h"
#include "noise_check.h"

namespace vqkernels {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
const char* const kMetrics[] = {"l2", "dot", "cosine"};
const char* const kScreens[] = {"packed", "packed, int8", "packed, tree"};
const char* const kDTypes[] = {"float32", "float16", "bfloat16"};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  float uniform() { return float(bits() >> 40) * 0x1p-23f - 1.0f; }  // in [-1, 1)

 private:
  uint64_t state_;
};

// Rows of one element type in memory that is neither contiguous nor free of NaN between the
// elements, beside their exact values.
class Matrix {
 public:
  Matrix(int64_t count, int64_t width, DType dtype, int64_t col_stride = 1)
      : count_(count), width_(width), dtype_(dtype), col_stride_(col_stride) {
    row_stride_ = width * col_stride + 3;
    dispatch(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      bytes_.resize(size_t(count * row_stride_) * sizeof(T));
      for (int64_t i = 0; i < count * row_stride_; ++i) put<T>(i, kNaN);
    });
  }

  void set(int64_t row, int64_t d, float value) {
    dispatch(dtype_, [&](auto* type) {
      put<std::remove_pointer_t<decltype(type)>>(row * row_stride_ + d * col_stride_, value);
    });
  }

  float get(int64_t row, int64_t d) const {
    return dispatch(dtype_, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T value;
      const int64_t at = row * row_stride_ + d * col_stride_;
      std::memcpy(&value, bytes_.data() + at * int64_t(sizeof(T)), sizeof(T));
      return to_float(value);
    });
  }

  void fill(Random& random, float offset) {
    for (int64_t row = 0; row < count_; ++row) {
      for (int64_t d = 0; d < width_; ++d) set(row, d, random.uniform() + offset);
    }
  }

  void copy_row(int64_t to, const Matrix& from, int64_t row) {
    for (int64_t d = 0; d < width_; ++d) set(to, d, from.get(row, d));
  }

  bool finite(int64_t row) const {
    for (int64_t d = 0; d < width_; ++d) {
      if (!std::isfinite(get(row, d))) return false;
    }
    return true;
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }

  Rows rows() {
    Rows rows;
    rows.data = bytes_.data();
    rows.dtype = dtype_;
    rows.count = count_;
    rows.width = width_;
    rows.col_stride = col_stride_;
    rows.rank = 1;
    rows.sizes[0] = count_;
    rows.strides[0] = row_stride_;
    return rows;
  }

 private:
  template <typename T>
  void put(int64_t at, float value) {
    const T element = from_float<T>(value);
    std::memcpy(bytes_.data() + at * int64_t(sizeof(T)), &element, sizeof(T));
  }

  int64_t count_, width_;
  DType dtype_;
  int64_t col_stride_, row_stride_ = 0;
  std::vector<unsigned char> bytes_;
};

class Checker {
 public:
  explicit Checker(const KernelTable& table) : table_(table) {}

  int64_t checked() const { return checked_; }
  int64_t failed() const { return failed_; }

  void run() {
    for (int64_t dim : {1, 3, 8, 9, 17, 64}) {
      for (int64_t codes : {1, 3, 37, 300}) {
        for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
          const float offset = codes == 37 ? 10.0f : 0.0f;
          const int64_t col_stride = codes == 300 ? 2 : 1;
          Matrix x(41, dim, dtype, col_stride), book(codes, dim, dtype, col_stride);
          plant(x, book, offset);
          where_ = " D=" + std::to_string(dim) + " K=" + std::to_string(codes) + " " +
                   kDTypes[int(dtype)];
          for (Metric metric : {Metric::l2, Metric::dot, Metric::cosine}) search(x, book, metric);
          quantize(x, book);
          statistics(x, book);
        }
      }
    }
    where_ = "";
    const auto good = [&](bool fine, const std::string& what, int64_t row) {
      expect(fine, what, row);
    };
    NoiseChecker(table_, good).run();
  }

 private:
  // Ties (repeated codes, rows that equal a code), codes so close that only float64 tells them
  // apart, a zero row, a NaN row, codes never to be chosen.
  static void plant(Matrix& x, Matrix& book, float offset) {
    Random random(uint64_t(book.count() * 1000 + x.width()));
    x.fill(random, offset);
    book.fill(random, offset);
    const int64_t codes = book.count();
    if (codes >= 3) book.copy_row(codes - 1, book, codes / 3);
    if (codes >= 37) {
      book.copy_row(codes - 2, book, 0);
      for (int64_t code = 5; code < 12; ++code) {
        book.copy_row(code, book, 4);
        const int64_t d = code % x.width();
        book.set(code, d, book.get(code, d) * (1 + 0x1p-22f * float(code % 2 ? code : -code)));
      }
      for (int64_t row = 14; row < 30; ++row) {
        for (int64_t d = 0; d < x.width(); ++d) {
          x.set(row, d, book.get(4, d) + 0x1p-7f * random.uniform());
        }
      }
      book.set(codes / 2, 0, kNaN);
      book.set(codes / 2 + 1, x.width() - 1, kInfinity);
      book.set(codes / 2 + 2, 0, -kInfinity);
    }
    for (int64_t row = 0; row < 10; ++row) x.copy_row(row, book, row * 7 % ((codes + 1) / 2));
    for (int64_t d = 0; d < x.width(); ++d) x.set(11, d, 0.0f);
    x.set(12, x.width() / 2, kNaN);
    x.set(13, 0, kInfinity);
  }

  void search(Matrix& x, Matrix& book, Metric metric) {
    const Codebook codebook{book.rows(), metric};
    const PackedLayout layout(book.count(), book.width());
    NearestTask task;
    task.x = x.rows();
    task.book = codebook;
    task.row_end = x.count();
    task.panel_end = (book.count() + table_.panel_width - 1) / table_.panel_width;

    std::vector<float> frame(size_t(layout.frame_words));
    table_.choose_frame(codebook, frame.data());
    task.frame = frame.data();
    search_as("in passing", task, x, book, metric);

    for (Screen screen : {Screen::fp32, Screen::int8, Screen::tree}) {
      if (screen == Screen::int8 && !(table_.int8_screen && book.width() >= kScreenDim)) continue;
      if (screen == Screen::tree && book.width() > kTreeDim) continue;
      std::vector<float> words(size_t(layout.words), 0.0f);
      table_.choose_frame(codebook, words.data());
      if (screen == Screen::tree) {
        table_.pack_tree(codebook, words.data());
      } else {
        table_.pack_panels(codebook, screen, 0, task.panel_end, words.data());
        table_.hide_duplicates(codebook, screen, words.data());
      }
      task.frame = task.packed = words.data();
      task.screen = screen;
      search_as(kScreens[int(screen)], task, x, book, metric);
    }
  }

  void search_as(const std::string& how, const NearestTask& task, Matrix& x, Matrix& book,
                 Metric metric) {
    std::vector<double> score(size_t(x.count()));
    std::vector<int64_t> found(size_t(x.count()), -2);
    table_.nearest_code(task, score.data(), found.data());
    for (int64_t row = 0; row < x.count(); ++row) {
      const std::string text = std::string("nearest_code ") + kMetrics[int(metric)] + " " + how;
      expect(is_nearest(x, row, book, metric, found[size_t(row)]), text, row);
    }
  }

  // To minimise: |x - c|^2 / 2 - |x|^2 / 2, -x.c, or -x.c / |c|.
  static double naive_score(Matrix& x, int64_t row, Matrix& book, int64_t code, Metric metric) {
    double product = 0, square = 0, distance = 0, x_square = 0;
    for (int64_t d = 0; d < x.width(); ++d) {
      const double a = x.get(row, d), b = book.get(code, d);
      product += a * b;
      square += b * b;
      x_square += a * a;
      distance += (a - b) * (a - b);
    }
    if (metric == Metric::l2) return (distance - x_square) / 2;
    if (metric == Metric::dot) return -product;
    return square > 0 ? -product / std::sqrt(square) : 0.0;
  }

  static bool is_nearest(Matrix& x, int64_t row, Matrix& book, Metric metric, int64_t found) {
    double best = std::numeric_limits<double>::infinity(), largest = 1;
    std::vector<double> scores(size_t(book.count()), best);
    for (int64_t code = 0; code < book.count() && x.finite(row); ++code) {
      if (!book.finite(code)) continue;
      double& score = scores[size_t(code)];
      score = naive_score(x, row, book, code, metric);
      best = std::min(best, score);
      largest = std::max(largest, std::fabs(score));
    }
    if (!std::isfinite(best)) return found == -1;
    if (found < 0 || found >= book.count()) return false;
    for (int64_t code = 0; code < found; ++code) {
      bool equal = true;
      for (int64_t d = 0; d < x.width(); ++d) equal &= book.get(code, d) == book.get(found, d);
      if (equal) return false;
    }
    const double slack = 1e-15 * double(x.width() + 8) * largest;
    return scores[size_t(found)] - best <= slack;
  }

  static std::vector<int64_t> some_indices(int64_t rows, int64_t codes) {
    Random random(7);
    std::vector<int64_t> indices;
    for (int64_t row = 0; row < rows; ++row) {
      indices.push_back(row % 9 == 4 ? -1 : int64_t(random.bits() % uint64_t(codes)));
    }
    return indices;
  }

  void quantize(Matrix& x, Matrix& book) {
    auto indices = some_indices(x.count(), book.count());
    double wanted = 0, terms = 0;
    for (int64_t row = 0; row < x.count(); ++row) {
      int64_t& index = indices[size_t(row)];
      if (index < 0 || !x.finite(row) || !book.finite(index)) {
        index = -1;
        continue;
      }
      for (int64_t d = 0; d < x.width(); ++d) {
        const double difference = double(x.get(row, d)) - book.get(index, d);
        wanted += difference * difference;
        terms += difference * difference + std::fabs(double(x.get(row, d)) * book.get(index, d));
      }
    }
    std::vector<char> kept(size_t(x.count()), 1);
    kept[4] = 0;
    Matrix out(x.count(), x.width(), x.rows().dtype);
    const double sum =
        table_.quantize_rows(x.rows(), book.rows(), indices.data(),
                             reinterpret_cast<const bool*>(kept.data()), out.rows(), 0, x.count());
    expect(std::fabs(sum - wanted) <= 1e-6 * terms, "quantize_rows' sum", 0);
    for (int64_t row = 0; row < x.count(); ++row) {
      const int64_t index = indices[size_t(row)];
      bool good = true;
      for (int64_t d = 0; d < x.width(); ++d) {
        const float value = out.get(row, d);
        const float code = index < 0 ? 0.0f : book.get(index, d);
        good &= index < 0 && row != 4 ? std::isnan(value) : value == code;
      }
      expect(good, "quantize_rows", row);
    }
  }

  void statistics(Matrix& x, Matrix& book) {
    const int64_t codes = book.count(), width = x.width();
    const auto indices = some_indices(x.count(), codes);
    Random random(11);
    std::vector<float> weights, counts(size_t(codes), kNaN), sums(size_t(codes * width), 0.0f);
    std::vector<double> wanted(sums.size(), 0.0), terms(sums.size(), 0.0), count(size_t(codes), 0);
    for (int64_t row = 0; row < x.count(); ++row) {
      weights.push_back(1.5f + random.uniform());
      const int64_t index = indices[size_t(row)];
      if (index < 0) continue;
      count[size_t(index)] += weights.back();
      for (int64_t d = 0; d < width; ++d) {
        const double term = double(weights.back()) * x.get(row, d);
        wanted[size_t(index * width + d)] += term;
        terms[size_t(index * width + d)] += std::fabs(term);
      }
    }
    table_.code_sums(x.rows(), indices.data(), weights.data(), nullptr, codes, 0, width,
                     sums.data());
    expect(table_.code_counts(indices.data(), weights.data(), x.count(), codes, counts.data()) == 0,
           "code_counts' indices", 0);
    for (int64_t code = 0; code < codes; ++code) {
      expect(std::fabs(counts[size_t(code)] - count[size_t(code)]) <= 1e-6 * count[size_t(code)],
             "code_counts", code);
      bool good = true;
      for (int64_t i = code * width; i < (code + 1) * width; ++i) {
        const double sum = sums[size_t(i)], right = wanted[size_t(i)];
        good &= std::isfinite(right) ? std::fabs(sum - right) <= 2e-7 * terms[size_t(i)]
                : std::isnan(right)  ? std::isnan(sum)
                                     : sum == right;
      }
      expect(good, "code_sums", code);
    }
  }

  void expect(bool good, const std::string& what, int64_t row) {
    ++checked_;
    if (good) return;
    if (++failed_ <= 20) {
      std::printf("%s: %s row %lld:%s is wrong\n", table_.name, what.c_str(), (long long)row,
                  where_.c_str());
    }
  }

  const KernelTable& table_;
  std::string where_;
  int64_t checked_ = 0, failed_ = 0;
};

const KernelTable* open_table(const char* path) {
  void* object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (object == nullptr) {
    std::printf("%s\n", dlerror());
    return nullptr;
  }
  using Entry = const KernelTable* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(object, "vqkernels_kernel_table"));
  const KernelTable* table = entry == nullptr ? nullptr : entry();
  if (table == nullptr || table->version != kKernelTableVersion) {
    std::printf("%s exports no kernel table of this version\n", path);
    return nullptr;
  }
  return table;
}

}  // namespace
}  // namespace vqkernels

int main(int count, char** paths) {
  bool good = count > 1;
  for (int i = 1; i < count; ++i) {
    const vqkernels::KernelTable* table = vqkernels::open_table(paths[i]);
    if (table == nullptr) return 2;
    vqkernels::Checker checker(*table);
    checker.run();
    good &= checker.failed() == 0;
    std::printf("%s: %s, %lld checks, %lld wrong\n", table->name,
                checker.failed() == 0 ? "ok" : "FAILED", (long long)checker.checked(),
                (long long)checker.failed());
  }
  return good ? 0 : 1;
}
