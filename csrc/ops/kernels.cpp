// Finds the kernel table for this processor: the shared object of the best instruction set that it
// reports, next to this one. VQKERNELS_CPU_CAPABILITY asks for a particular one.
#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <string>

#include "tensors.h"

namespace vqkernels {
namespace {

struct Capability {
  const char* name;
  bool supported;
};

// Best first. A set counts as supported only with every extension its object was compiled for.
auto capabilities() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni_bf16 =
      avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  return std::array<Capability, 4>{
      {{"avx512_vnni_bf16", vnni_bf16}, {"avx512", avx512}, {"avx2", avx2}, {"portable", true}}};
#elif defined(__aarch64__)
  return std::array<Capability, 2>{{{"neon", true}, {"portable", true}}};
#else
  return std::array<Capability, 1>{{{"portable", true}}};
#endif
}

struct Loaded {
  const KernelTable* table = nullptr;
  std::string problem;
};

#if defined(__APPLE__)
constexpr const char* kSuffix = ".dylib";
#else
constexpr const char* kSuffix = ".so";
#endif

const KernelTable* open_table(const std::string& path, std::string& problem) {
  void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (object == nullptr) {
    problem = dlerror();
    return nullptr;
  }
  using Entry = const KernelTable* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(object, "vqkernels_kernel_table"));
  const KernelTable* table = entry == nullptr ? nullptr : entry();
  if (table == nullptr || table->version != kKernelTableVersion) {
    problem = path + " belongs to another build of vqkernels";
    return nullptr;
  }
  return table;
}

Loaded load() {
  Loaded loaded;
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&open_table), &self) == 0 || self.dli_fname == nullptr) {
    loaded.problem = "the ops object cannot tell where it lies";
    return loaded;
  }
  const std::string path = self.dli_fname;
  const std::string directory = path.substr(0, path.rfind('/') + 1);
  const char* asked = std::getenv("VQKERNELS_CPU_CAPABILITY");
  std::string known;
  for (const Capability& capability : capabilities()) {
    known += std::string(known.empty() ? "" : ", ") + capability.name +
             (capability.supported ? "" : " (not on this processor)");
    if (asked != nullptr && *asked != '\0' && asked != std::string(capability.name)) continue;
    if (!capability.supported) continue;
    std::string problem;
    loaded.table = open_table(directory + "libvqkernels_cpu_" + capability.name + kSuffix, problem);
    if (loaded.table != nullptr) return loaded;
    if (loaded.problem.empty()) loaded.problem = problem;
  }
  if (loaded.problem.empty()) {
    loaded.problem = "VQKERNELS_CPU_CAPABILITY must be one of " + known + ", got '" +
                     std::string(asked == nullptr ? "" : asked) + "'";
  }
  return loaded;
}

const Loaded& loaded() {
  static const Loaded once = load();
  return once;
}

}  // namespace

const KernelTable& kernels() {
  if (loaded().table == nullptr) throw std::runtime_error(loaded().problem);
  return *loaded().table;
}

}  // namespace vqkernels

extern "C" __attribute__((visibility("default"))) const char* vqkernels_cpu_problem() {
  const auto& loaded = vqkernels::loaded();
  return loaded.table == nullptr ? loaded.problem.c_str() : nullptr;
}

extern "C" __attribute__((visibility("default"))) const char* vqkernels_cpu_capability() {
  const auto& loaded = vqkernels::loaded();
  return loaded.table == nullptr ? nullptr : loaded.table->name;
}

// Every instruction set that kernels can be built for here, and whether the processor has it:
// "avx512=0 avx2=1 portable=1".
extern "C" __attribute__((visibility("default"))) const char* vqkernels_cpu_capabilities() {
  static const std::string listed = [] {
    std::string text;
    for (const auto& capability : vqkernels::capabilities()) {
      text += std::string(text.empty() ? "" : " ") + capability.name +
              (capability.supported ? "=1" : "=0");
    }
    return text;
  }();
  return listed.c_str();
}
