// What the memory checks read out of the shared object that holds the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

struct Variable {
  uintptr_t begin;
  size_t bytes;
  std::string name;
};

struct Image {
  std::string path;
  uintptr_t base = 0, begin = 0, end = 0;
  uintptr_t zeroed_begin = 0, zeroed_end = 0;  // .bss
  std::vector<Variable> shared;                // the kernels' static variables in .bss
};

// The image that `code` lies in.
Image read_image(const void* code);

// "file.cu:123" of an instruction that returns to `pc`: the innermost line that is not the
// emulation's or the C++ library's.
std::string source_line(const Image& image, const void* pc);

}  // namespace emulation
