// Checked memory: bounds, alignment, initialization, races, copies in flight.
//
// Two accesses to a byte, one of them writing and not both atomic, are a race unless a barrier
// orders them. For threads of one block that is __syncthreads, counted in epochs; for lanes of one
// warp also __syncwarp, kept as vector clocks; between blocks of a launch it is nothing.
#include "cuda_emulation_memory.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cuda_emulation_engine.h"

extern "C" void* __asan_region_is_poisoned(void*, size_t) __attribute__((weak));

namespace emulation {
namespace {

struct LastWrite {
  uint32_t epoch = 0, clock = 0, place = 0;
  uint16_t thread = 0;
  bool atomic = false;
  bool bulk = false;  // by a bulk copy that has arrived: ordered before all who waited for it
};

// The lanes of one warp that read in one epoch, at one clock.
struct LastRead {
  uint32_t epoch = 0, clock = 0, place = 0, lanes = 0;
  uint16_t warp = 0;
};

struct Byte {
  LastWrite write;
  LastRead reads[2];   // of different warps
  bool known = false;  // holds a value that someone wrote
  bool in_flight = false;
};

struct Region {
  uintptr_t begin = 0, end = 0;
  std::string name;
  bool shared = false;
  std::vector<Byte> bytes;
};

// The kernels report their accesses. Set before constructors of this file may have run.
bool checked = false;

struct Memory {
  std::vector<std::unique_ptr<Region>> regions;  // sorted by address
  Region* latest = nullptr;
  Image image;
  bool image_known = false;
  uintptr_t main_stack_begin = 0, main_stack_end = 0;

  uint32_t epoch = 1;  // since the process began; each barrier and each block begins one
  uint32_t block_epoch = 1, launch_epoch = 1;  // the first of the running block and launch
  std::vector<uint32_t> clocks;  // [thread][lane]: what thread has seen of its warp's lanes
  std::vector<Site> sites;
  int64_t in_flight = 0;    // bytes of shared memory
  int counted_thread = -1;  // whose `accesses` are counted, since it ran first in `counted_epoch`
  uint32_t counted_epoch = 0;
  int64_t accesses = 0;
};
Memory memory;

uint32_t& clock_of(int thread, int lane) { return memory.clocks[size_t(thread) * 32 + lane]; }

// Places --------------------------------------------------------------------------------------

// A place as a number: an offset into the image, or an index of `sites` with the top bit set.
constexpr uint32_t site_bit = 1u << 31;

uint32_t place_number(Where where) {
  if (where.site.file == nullptr) {
    return uint32_t(reinterpret_cast<uintptr_t>(where.pc) - memory.image.base);
  }
  for (size_t index = 0; index < memory.sites.size(); ++index) {
    const Site& known = memory.sites[index];
    if (known.line == where.site.line && known.file == where.site.file) {
      return uint32_t(index) | site_bit;
    }
  }
  memory.sites.push_back(where.site);
  return uint32_t(memory.sites.size() - 1) | site_bit;
}

Where place_of(uint32_t number) {
  if (number & site_bit) return {memory.sites[number & ~site_bit], nullptr};
  return {{nullptr, 0}, reinterpret_cast<const void*>(memory.image.base + number)};
}

// Regions -------------------------------------------------------------------------------------

Region* find_region(uintptr_t address) {
  Region* latest = memory.latest;
  if (latest != nullptr && address >= latest->begin && address < latest->end) return latest;
  auto after = std::upper_bound(
      memory.regions.begin(), memory.regions.end(), address,
      [](uintptr_t value, const std::unique_ptr<Region>& region) { return value < region->begin; });
  if (after == memory.regions.begin()) return nullptr;
  Region* region = (after - 1)->get();
  if (address >= region->end) return nullptr;
  return memory.latest = region;
}

Region& add_region(uintptr_t begin, size_t bytes, std::string name, bool shared) {
  auto region = std::make_unique<Region>();
  region->begin = begin;
  region->end = begin + bytes;
  region->name = std::move(name);
  region->shared = shared;
  if (checked) region->bytes.resize(bytes);
  Region& added = *region;
  auto place = std::find_if(memory.regions.begin(), memory.regions.end(),
                            [&](const auto& other) { return other->begin > begin; });
  memory.regions.insert(place, std::move(region));
  memory.latest = nullptr;
  return added;
}

void remove_region(uintptr_t begin) {
  memory.regions.erase(std::remove_if(memory.regions.begin(), memory.regions.end(),
                                      [&](const auto& region) { return region->begin == begin; }),
                       memory.regions.end());
  memory.latest = nullptr;
}

std::string describe(uintptr_t address) {
  const Region* nearest = nullptr;
  uintptr_t least = ~uintptr_t(0);
  for (const auto& region : memory.regions) {
    const uintptr_t distance = address < region->begin  ? region->begin - address
                               : address >= region->end ? address - region->end + 1
                                                        : 0;
    if (distance >= least) continue;
    least = distance;
    nearest = region.get();
  }
  if (nearest == nullptr) return "an address of no registered array";
  const std::string name = (nearest->shared ? "shared " : "global ") + nearest->name;
  if (least > (64 << 10)) return "an address of no registered array, far from any";
  if (address < nearest->begin) return std::to_string(least) + " bytes before " + name;
  return "byte " + std::to_string(address - nearest->begin) + " of " + name + ", which has " +
         std::to_string(nearest->end - nearest->begin);
}

// Memory that kernels may use and that nobody else can see, or that nobody writes.
bool is_private(uintptr_t address) {
  if (address >= memory.main_stack_begin && address < memory.main_stack_end) return true;
  if (address < memory.image.begin || address >= memory.image.end) return false;
  const uintptr_t own = reinterpret_cast<uintptr_t>(&builtins);
  if (address >= own && address < own + sizeof(builtins)) return true;
  return address < memory.image.zeroed_begin || address >= memory.image.zeroed_end;
}

// Checks --------------------------------------------------------------------------------------

bool ordered_in_warp(int before, uint32_t clock, int after) {
  return before / 32 == after / 32 && clock_of(after, before % 32) >= clock;
}

const char* verb(Access kind) {
  return kind == Access::read ? "read" : kind == Access::write ? "write" : "atomic update";
}

struct Check {
  uintptr_t address;
  size_t bytes;
  Access kind;
  Where where;
  int thread;
  uint32_t place;

  void report(const char* name, const std::string& detail) const {
    fault(std::string(name) + ": " + verb(kind) + " of " + std::to_string(bytes) + " bytes at " +
              describe(address) + detail,
          where, thread);
  }

  void race(const Region& region, const char* other_verb, uint32_t other_place,
            uint32_t other_epoch, int other_thread) const {
    std::string detail = std::string(", against a ") + other_verb + " at " +
                         text(place_of(other_place)) + " by thread ";
    detail += text(engine.threads[other_thread].index);
    if (other_epoch < memory.block_epoch) detail += " of another block";
    report(region.shared ? "race on shared memory" : "race on global memory", detail);
  }

  // Whether all is well with one byte.
  bool one(const Region& region, Byte& byte) const {
    if (byte.in_flight) {
      report(
          "missing wait for a copy",
          ", which a copy issued at " + text(place_of(byte.write.place)) + " has not filled yet");
      return false;
    }
    const bool known = region.shared ? byte.write.epoch >= memory.block_epoch : byte.known;
    if (kind != Access::write && !known) {
      report("uninitialized read", "");
      return false;
    }
    const uint32_t horizon = region.shared ? memory.block_epoch : memory.launch_epoch;
    const LastWrite& write = byte.write;
    const bool ordered = write.bulk || (write.atomic && kind == Access::atomic);
    if (write.epoch >= horizon && !ordered) {
      const bool concurrent = write.epoch < memory.block_epoch ||
                              (write.epoch == memory.epoch && write.thread != thread &&
                               !ordered_in_warp(write.thread, write.clock, thread));
      if (concurrent) {
        race(region, write.atomic ? "atomic update" : "write", write.place, write.epoch,
             write.thread);
        return false;
      }
    }
    if (kind == Access::read) {
      note_read(byte);
      return true;
    }
    for (const LastRead& read : byte.reads) {
      if (read.epoch < horizon) continue;
      const int other = concurrent_reader(read);
      if (other >= 0) {
        race(region, "read", read.place, read.epoch, other);
        return false;
      }
    }
    byte.write = {memory.epoch, clock_of(thread, thread % 32), place, uint16_t(thread),
                  kind == Access::atomic};
    byte.known = true;
    return true;
  }

  // A thread whose read nothing orders before this access, or -1.
  int concurrent_reader(const LastRead& read) const {
    const int first = read.warp * 32;
    if (read.epoch < memory.block_epoch) return first + __builtin_ctz(read.lanes);
    if (read.epoch < memory.epoch) return -1;
    for (uint32_t lanes = read.lanes; lanes != 0; lanes &= lanes - 1) {
      const int other = first + __builtin_ctz(lanes);
      if (other != thread && !ordered_in_warp(other, read.clock, thread)) return other;
    }
    return -1;
  }

  void note_read(Byte& byte) const {
    const uint32_t clock = clock_of(thread, thread % 32);
    const uint16_t warp = uint16_t(thread / 32);
    for (LastRead& read : byte.reads) {
      if (read.warp != warp || read.epoch < memory.block_epoch) continue;
      const bool same = read.epoch == memory.epoch && read.clock == clock;
      read = {memory.epoch, clock, place, (same ? read.lanes : 0) | 1u << thread % 32, warp};
      return;
    }
    byte.reads[1] = byte.reads[0];
    byte.reads[0] = {memory.epoch, clock, place, 1u << thread % 32, warp};
  }
};

// A thread that goes on forever, say because it looks for what another one was to write.
constexpr int64_t most_accesses = 1 << 24;

void count_access(Where where) {
  if (memory.counted_thread != engine.current || memory.counted_epoch != memory.epoch) {
    memory.counted_thread = engine.current;
    memory.counted_epoch = memory.epoch;
    memory.accesses = 0;
  }
  if (++memory.accesses > most_accesses) {
    fault("deadlock: " + std::to_string(most_accesses) + " accesses and no end", where);
  }
}

void open_image() {
  if (memory.image_known) return;
  memory.image_known = true;
  memory.image = read_image(reinterpret_cast<const void*>(&open_image));
  for (const Variable& variable : memory.image.shared) {
    add_region(variable.begin, variable.bytes, variable.name, true);
  }
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
  }
  memory.main_stack_begin = reinterpret_cast<uintptr_t>(begin);
  memory.main_stack_end = memory.main_stack_begin + bytes;
}

}  // namespace

std::string text(Where where) {
  if (where.site.file == nullptr) return source_line(memory.image, where.pc);
  const char* slash = std::strrchr(where.site.file, '/');
  return std::string(slash == nullptr ? where.site.file : slash + 1) + ":" +
         std::to_string(where.site.line);
}

void access(const void* address, size_t bytes, Access kind, Where where, int thread,
            size_t alignment) {
  if (engine.current < 0) return;  // the host's code is not checked
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin >= reinterpret_cast<uintptr_t>(stacks.begin) &&
      begin < reinterpret_cast<uintptr_t>(stacks.end)) {
    return;
  }
  if (thread < 0) thread = engine.current;
  count_access(where);
  Check check{begin, bytes, kind, where, thread, 0};
  if (begin % alignment != 0) {
    return check.report("misaligned access",
                        ", which is not a multiple of " + std::to_string(alignment));
  }
  if (!checked) {
    // AddressSanitizer sees kernels' own accesses; these are made for them.
    const bool sanitized = __asan_region_is_poisoned != nullptr;
    if (sanitized && __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr) {
      check.report("out of bounds", "");
    }
    return;
  }
  Region* region = find_region(begin);
  if (region == nullptr) {
    if (!is_private(begin)) check.report("out of bounds", "");
    return;
  }
  if (begin + bytes > region->end) return check.report("out of bounds", "");
  check.place = place_number(where);
  for (size_t index = begin - region->begin; index < begin - region->begin + bytes; ++index) {
    if (!check.one(*region, region->bytes[index])) return;
  }
}

void add_array(const void* data, size_t bytes, bool initialized, const std::string& name) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  // An allocator gave freed memory out again: what lay there is gone.
  memory.regions.erase(std::remove_if(memory.regions.begin(), memory.regions.end(),
                                      [&](const auto& other) {
                                        return !other->shared && other->begin < begin + bytes &&
                                               begin < other->end;
                                      }),
                       memory.regions.end());
  remove_array(data);
  Region& region = add_region(begin, bytes, name, false);
  for (Byte& byte : region.bytes) byte.known = initialized;
}

void remove_array(const void* data) { remove_region(reinterpret_cast<uintptr_t>(data)); }

void fill(void* data, int value, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (checked && bytes > 0) {
    Region* region = find_region(begin);
    if (region == nullptr || begin + bytes > region->end) {
      throw std::runtime_error("cudaMemset out of bounds: " + std::to_string(bytes) + " bytes at " +
                               describe(begin));
    }
    for (uintptr_t index = begin; index < begin + bytes; ++index) {
      region->bytes[index - region->begin].known = true;
    }
  }
  std::memset(data, value, bytes);
}

void check_memory() { checked = true; }

// What the engine tells -------------------------------------------------------------------------

void memory_begin_launch() {
  open_image();
  memory.launch_epoch = memory.epoch + 1;
  memory.clocks.assign(size_t(engine.threads.size()) * 32, 0);
  if (engine.configuration->shared_bytes > 0) {
    add_region(reinterpret_cast<uintptr_t>(engine.shared_begin), engine.configuration->shared_bytes,
               "dynamic memory", true);
  }
}

void memory_begin_block(void* shared, size_t bytes) {
  std::memset(shared, 0xff, bytes);
  for (const Variable& variable : memory.image.shared) {
    std::memset(reinterpret_cast<void*>(variable.begin), 0xff, variable.bytes);
  }
  memory.block_epoch = ++memory.epoch;
  if (!checked) return;
  for (int thread = 0; thread < engine.count; ++thread) {
    std::fill_n(&clock_of(thread, 0), 32, 0);
    clock_of(thread, thread % 32) = 1;
  }
  if (memory.in_flight == 0) return;
  memory.in_flight = 0;
  for (auto& region : memory.regions) {  // copies that the block before left there
    if (!region->shared) continue;
    for (Byte& byte : region->bytes) byte.in_flight = false;
  }
}

void memory_end_launch() {
  if (engine.configuration->shared_bytes > 0) {
    remove_region(reinterpret_cast<uintptr_t>(engine.shared_begin));
  }
}

void memory_barrier() { ++memory.epoch; }

void memory_warp_barrier(int first_thread, uint32_t mask) {
  if (!checked) return;
  uint32_t joined[32] = {};
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int thread = first_thread + __builtin_ctz(lanes);
    for (int lane = 0; lane < 32; ++lane) {
      joined[lane] = std::max(joined[lane], clock_of(thread, lane));
    }
  }
  for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes), thread = first_thread + lane;
    std::copy_n(joined, 32, &clock_of(thread, 0));
    ++clock_of(thread, lane);
  }
}

void memory_copy_issued(const void* to, size_t bytes, Site) {
  if (!checked) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  Region* region = find_region(begin);
  for (size_t index = 0; index < bytes; ++index) {
    region->bytes[begin - region->begin + index].in_flight = true;
  }
  memory.in_flight += int64_t(bytes);
}

void memory_copy_arrived(const void* to, size_t bytes, Site site) {
  if (!checked) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  Region* region = find_region(begin);
  for (size_t index = 0; index < bytes; ++index) {
    region->bytes[begin - region->begin + index].in_flight = false;
  }
  memory.in_flight -= int64_t(bytes);
  access(to, bytes, Access::write, {site, nullptr});
}

void memory_bulk_arrived(const void* to, size_t bytes) {
  if (!checked) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(to);
  Region* region = find_region(begin);
  for (size_t index = 0; index < bytes; ++index) {
    Byte& byte = region->bytes[begin - region->begin + index];
    byte.in_flight = false;
    byte.write.bulk = true;
  }
  memory.in_flight -= int64_t(bytes);
}

void memory_async_read(const void* from, size_t bytes, Site site, int thread) {
  if (!is_shared(from, bytes)) {
    fault("wgmma out of bounds: its codes do not lie in shared memory", {site, nullptr}, thread);
  }
  access(from, bytes, Access::read, {site, nullptr}, thread, bytes);
  if (!checked) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  const Region* region = find_region(begin);
  for (size_t index = 0; index < bytes; ++index) {
    const LastWrite& write = region->bytes[begin - region->begin + index].write;
    if (write.bulk) continue;
    return fault("missing async proxy fence: wgmma reads " + describe(begin) + ", written at " +
                     text(place_of(write.place)) + " by a thread",
                 {site, nullptr}, thread);
  }
}

bool is_shared(const void* address, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  const Region* region = find_region(begin);
  return region != nullptr && region->shared && begin + bytes <= region->end;
}

}  // namespace emulation
