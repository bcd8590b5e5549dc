// What compilers call before each access under -fsanitize=thread. The race build gives kernels that
// flag and links this, compiled without it, in place of the sanitizer's library.
#include "cuda_emulation_engine.h"

namespace {

inline void accessed(const void* address, size_t bytes, emulation::Access kind, const void* pc,
                     size_t alignment) {
  emulation::access(address, bytes, kind, {{nullptr, 0}, pc}, -1, alignment);
}

}  // namespace

#define EMULATION_CALLBACK extern "C" __attribute__((visibility("hidden"))) void
#define EMULATION_CALLBACKS(bytes)                                                          \
  EMULATION_CALLBACK __tsan_read##bytes(void* address) {                                    \
    accessed(address, bytes, emulation::Access::read, __builtin_return_address(0), bytes);  \
  }                                                                                         \
  EMULATION_CALLBACK __tsan_write##bytes(void* address) {                                   \
    accessed(address, bytes, emulation::Access::write, __builtin_return_address(0), bytes); \
  }                                                                                         \
  EMULATION_CALLBACK __tsan_unaligned_read##bytes(void* address) {                          \
    accessed(address, bytes, emulation::Access::read, __builtin_return_address(0), 1);      \
  }                                                                                         \
  EMULATION_CALLBACK __tsan_unaligned_write##bytes(void* address) {                         \
    accessed(address, bytes, emulation::Access::write, __builtin_return_address(0), 1);     \
  }

EMULATION_CALLBACKS(1)
EMULATION_CALLBACKS(2)
EMULATION_CALLBACKS(4)
EMULATION_CALLBACKS(8)
EMULATION_CALLBACKS(16)

EMULATION_CALLBACK __tsan_read_range(void* address, size_t bytes) {
  accessed(address, bytes, emulation::Access::read, __builtin_return_address(0), 1);
}
EMULATION_CALLBACK __tsan_write_range(void* address, size_t bytes) {
  accessed(address, bytes, emulation::Access::write, __builtin_return_address(0), 1);
}
EMULATION_CALLBACK __tsan_vptr_update(void**, void*) {}
EMULATION_CALLBACK __tsan_vptr_read(void**) {}
EMULATION_CALLBACK __tsan_func_entry(void*) {}
EMULATION_CALLBACK __tsan_func_exit() {}
EMULATION_CALLBACK __tsan_init() { emulation::check_memory(); }
