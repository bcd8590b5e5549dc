// Reads symbols and source lines of the shared object that this is linked into.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <utility>

#include "cuda_emulation_memory.h"

namespace emulation {
namespace {

// The last name of a mangled local variable: `tile` of `void kernel<float>()::tile`.
std::string local_name(const char* mangled) {
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> full(
      abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  if (status != 0) return mangled;
  const std::string name = full.get();
  const size_t last = name.rfind("::");
  return last == std::string::npos ? name : name.substr(last + 2);
}

// Whether a mangled name is `function`'s, a length, a name of that length, perhaps _ and a number.
bool is_local_name(const std::string& name, const std::string& function) {
  if (name.compare(0, function.size(), function) != 0) return false;
  char* end = nullptr;
  const char* rest = name.c_str() + function.size();
  const size_t length = std::strtoul(rest, &end, 10);
  if (end == rest || length > std::strlen(end)) return false;
  return end[length] == '\0' || end[length] == '_';
}

template <typename T>
const T* at(const std::string& file, size_t offset) {
  return reinterpret_cast<const T*>(file.data() + offset);
}

}  // namespace

Image read_image(const void* code) {
  Image image;
  Dl_info info;
  if (dladdr(code, &info) == 0) return image;
  image.path = info.dli_fname;
  image.base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::ifstream stream(image.path, std::ios::binary);
  const std::string file((std::istreambuf_iterator<char>(stream)), {});
  const auto* header = at<ElfW(Ehdr)>(file, 0);
  image.begin = image.base;
  for (int index = 0; index < header->e_phnum; ++index) {
    const auto* part = at<ElfW(Phdr)>(file, header->e_phoff) + index;
    if (part->p_type == PT_LOAD) image.end = image.base + part->p_vaddr + part->p_memsz;
  }
  const auto* sections = at<ElfW(Shdr)>(file, header->e_shoff);
  const char* section_names = file.data() + sections[header->e_shstrndx].sh_offset;
  int zeroed = -1;
  for (int index = 0; index < header->e_shnum; ++index) {
    if (std::strcmp(section_names + sections[index].sh_name, ".bss") != 0) continue;
    zeroed = index;
    image.zeroed_begin = image.base + sections[index].sh_addr;
    image.zeroed_end = image.zeroed_begin + sections[index].sh_size;
  }
  for (int index = 0; index < header->e_shnum; ++index) {
    if (sections[index].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = at<ElfW(Sym)>(file, sections[index].sh_offset);
    const char* names = file.data() + sections[sections[index].sh_link].sh_offset;
    std::vector<std::string> kernels;  // how the names of their variables begin
    std::vector<std::pair<std::string, Variable>> variables;
    for (size_t symbol = 0; symbol < sections[index].sh_size / sizeof(*symbols); ++symbol) {
      const auto& entry = symbols[symbol];
      const std::string name = names + entry.st_name;
      const bool variable = ELF64_ST_TYPE(entry.st_info) == STT_OBJECT;
      if (!variable || entry.st_shndx != zeroed || name.rfind("_ZZ", 0) != 0) continue;
      const size_t guard = name.find("emulation_guard_");
      if (guard == std::string::npos) {
        const uintptr_t begin = image.base + entry.st_value;
        variables.push_back({name, {begin, entry.st_size, local_name(name.c_str())}});
      } else {  // less the length of the guard's name
        kernels.push_back(name.substr(0, name.find_last_not_of("0123456789", guard - 1) + 1));
      }
    }
    for (auto& [name, variable] : variables) {
      for (const std::string& kernel : kernels) {
        if (!is_local_name(name, kernel)) continue;
        image.shared.push_back(std::move(variable));
        break;
      }
    }
  }
  return image;
}

std::string source_line(const Image& image, const void* pc) {
  char command[4096];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%lx 2>/dev/null",
                image.path.c_str(),
                static_cast<unsigned long>(reinterpret_cast<uintptr_t>(pc) - image.base - 1));
  std::string found;
  std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), pclose);
  char line[4096];
  while (pipe != nullptr && std::fgets(line, sizeof(line), pipe.get()) != nullptr) {
    std::string place = line;
    place = place.substr(0, place.find_first_of(" \n"));  // drops "(discriminator 2)"
    const bool inside = place.find("cuda_emulation") == std::string::npos &&
                        place.find("/include/") == std::string::npos;
    const size_t slash = place.rfind('/');
    if (slash != std::string::npos) place = place.substr(slash + 1);
    if (found.empty() || inside) found = place;
    if (inside) break;
  }
  return found.empty() ? "an unknown place" : found;
}

}  // namespace emulation
