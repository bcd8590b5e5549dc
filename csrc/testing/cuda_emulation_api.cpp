// What tests call through ctypes, beside the kernels' entry points.
#include <cstdlib>
#include <cstring>

#include "cuda_emulation_core.h"

EMULATION_EXPORT void emulation_register(const void* data, int64_t bytes, int initialized,
                                         const char* name) {
  emulation::add_array(data, size_t(bytes), initialized != 0, name);
}

EMULATION_EXPORT void emulation_unregister(const void* data) { emulation::remove_array(data); }

// Exactly this much memory, so that AddressSanitizer knows its end, aligned as torch aligns it.
EMULATION_EXPORT void* emulation_allocate(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, size_t(bytes)) != 0) return nullptr;
  std::memset(memory, 0xff, size_t(bytes));
  return memory;
}

EMULATION_EXPORT void emulation_free(void* memory) {
  emulation::remove_array(memory);
  std::free(memory);
}

EMULATION_EXPORT void emulation_set_order(int order, uint64_t seed) {
  emulation::set_order(static_cast<emulation::Order>(order), seed);
}

EMULATION_EXPORT void emulation_disable(const char* file, int line) {
  emulation::disable(file, line);
}

EMULATION_EXPORT void emulation_enable_all() { emulation::enable_all(); }

EMULATION_EXPORT int64_t emulation_times_disabled() { return emulation::times_disabled(); }

EMULATION_EXPORT int64_t emulation_times_reached(const char* file, int line) {
  return emulation::times_reached(file, line);
}

EMULATION_EXPORT void emulation_forget_reached() { emulation::forget_reached(); }
EMULATION_EXPORT void emulation_release_stacks() { emulation::release_stacks(); }
