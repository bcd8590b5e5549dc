// Launches, the order of threads, faults, and what tests set.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "cuda_emulation_core.h"
#include "cuda_emulation_engine.h"

namespace emulation {

Builtins builtins;
Engine engine;

namespace {

constexpr size_t most_shared_bytes = 227 << 10;  // of a block on the devices with the most

struct Disabled {
  std::string file;
  int line;
};

struct Reached {
  Site site;
  int64_t times;
};

struct Scheduler {
  Order order = Order::forward;
  uint64_t seed = 0, random = 0;
  std::vector<int> sequence;
  void (*call)(void*) = nullptr;
  void* argument = nullptr;
  std::string fault;  // empty: none yet
  std::string kept;
  std::vector<Disabled> disabled;
  int64_t times_disabled = 0;
  std::vector<Reached> reached;
};
Scheduler scheduler;

void run_thread() {
  scheduler.call(scheduler.argument);
  Thread& thread = engine.threads[engine.current];
  thread.state = State::exited;
  ++engine.exited;
  if (engine.arrived > 0) {
    const Thread& waiting =
        *std::find_if(engine.threads.begin(), engine.threads.begin() + engine.count,
                      [](const Thread& other) { return other.state == State::barrier; });
    fault(std::string("barrier with exited threads: this thread has left the kernel and others "
                      "wait in ") +
              waiting.waits,
          {waiting.site, nullptr});
  }
  leave(engine.current);
}

// Faults ----------------------------------------------------------------------------------------

std::string file_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

}  // namespace

bool is_disabled(Site site) {
  auto known =
      std::find_if(scheduler.reached.begin(), scheduler.reached.end(), [&](const Reached& other) {
        return other.site.line == site.line && other.site.file == site.file;
      });
  if (known == scheduler.reached.end()) {
    scheduler.reached.push_back({site, 0});
    known = scheduler.reached.end() - 1;
  }
  ++known->times;
  for (const Disabled& place : scheduler.disabled) {
    if (place.line == site.line && place.file == file_name(site.file)) {
      ++scheduler.times_disabled;
      return true;
    }
  }
  return false;
}

// Scheduling ------------------------------------------------------------------------------------

void shuffle_sequence() {
  if (scheduler.order != Order::shuffled) return;
  for (int left = engine.count; left > 1; --left) {
    // xorshift64*
    scheduler.random ^= scheduler.random >> 12;
    scheduler.random ^= scheduler.random << 25;
    scheduler.random ^= scheduler.random >> 27;
    const uint64_t drawn = (scheduler.random * 0x2545f4914f6cdd1dull) >> 33;
    std::swap(scheduler.sequence[left - 1], scheduler.sequence[drawn % uint64_t(left)]);
  }
}

namespace {

void run_block(uint3 block) {
  const dim3 size = engine.configuration->block;
  builtins.block = block;
  engine.arrived = engine.exited = engine.votes = 0;
  engine.copy_barriers.clear();
  for (int index = 0; index < engine.count; ++index) {
    Thread& thread = engine.threads[index];
    thread.state = State::ready;
    thread.index = {unsigned(index) % size.x, unsigned(index) / size.x % size.y,
                    unsigned(index) / (size.x * size.y)};
    thread.open.clear();
    thread.groups.clear();
    thread.open_products.clear();
    thread.product_groups.clear();
    prepare_stack(index, run_thread);
  }
  memory_begin_block(engine.shared_begin, engine.configuration->shared_bytes);
  shuffle_sequence();
  while (engine.exited < engine.count) {
    bool ran = false;
    for (int place = 0; place < engine.count; ++place) {
      const int index = scheduler.sequence[place];
      if (engine.threads[index].state != State::ready) continue;
      ran = true;
      engine.current = index;
      builtins.thread = engine.threads[index].index;
      enter(index);
      engine.current = -1;
      if (!scheduler.fault.empty()) return;
    }
    if (!ran) return explain_standstill();
  }
}

void check_configuration(const Configuration& configuration) {
  const dim3 grid = configuration.grid, block = configuration.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  std::string what;
  if (threads == 0 || threads > most_threads || block.z > 64) what = "its block's size";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    what = "its grid's size";
  }
  if (configuration.shared_bytes > most_shared_bytes) what = "its shared memory's size";
  if (what.empty()) return;
  throw std::runtime_error(std::string("no device launches ") + configuration.name + " with " +
                           what + ": grid " + text({grid.x, grid.y, grid.z}) + ", block " +
                           text({block.x, block.y, block.z}) + ", shared bytes " +
                           std::to_string(configuration.shared_bytes));
}

}  // namespace

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

void fault(const std::string& what, Where where, int thread) {
  if (engine.configuration == nullptr || !scheduler.fault.empty()) return;
  if (thread < 0) thread = engine.current;
  scheduler.fault = what + "\n  at " + text(where) + " in kernel " + engine.configuration->name +
                    ", block " + text(builtins.block);
  if (thread >= 0) scheduler.fault += ", thread " + text(engine.threads[thread].index);
  if (engine.current >= 0)
    leave(engine.current);  // the block ends here: nobody resumes this thread
}

void launch(const Configuration& configuration, void (*call)(void*), void* argument) {
  check_configuration(configuration);
  allocate_stacks();
  engine.threads.resize(most_threads);
  engine.configuration = &configuration;
  engine.count = int(configuration.block.x * configuration.block.y * configuration.block.z);
  // Allocated anew and no larger than asked for, so that AddressSanitizer knows its end.
  void* shared = nullptr;
  if (posix_memalign(&shared, 16, configuration.shared_bytes) != 0) throw std::bad_alloc();
  engine.shared_begin = shared;
  scheduler.call = call;
  scheduler.argument = argument;
  scheduler.fault.clear();
  scheduler.random = scheduler.seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
  scheduler.sequence.resize(engine.count);
  std::iota(scheduler.sequence.begin(), scheduler.sequence.end(), 0);
  if (scheduler.order == Order::reverse) {
    std::reverse(scheduler.sequence.begin(), scheduler.sequence.end());
  }
  builtins.block_size = configuration.block;
  builtins.grid_size = configuration.grid;
  memory_begin_launch();
  const dim3 grid = configuration.grid;
  for (unsigned z = 0; z < grid.z && scheduler.fault.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && scheduler.fault.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && scheduler.fault.empty(); ++x) run_block({x, y, z});
    }
  }
  memory_end_launch();
  if (!scheduler.fault.empty()) forget_frames(engine.count);
  std::free(shared);
  engine.shared_begin = nullptr;
  engine.configuration = nullptr;
  if (!scheduler.fault.empty()) throw std::runtime_error(scheduler.fault);
}

void* dynamic_shared() { return engine.shared_begin; }

// Tests -------------------------------------------------------------------------------------------

void set_order(Order order, uint64_t seed) {
  scheduler.order = order;
  scheduler.seed = seed;
}

void disable(const std::string& file, int line) { scheduler.disabled.push_back({file, line}); }

void enable_all() {
  scheduler.disabled.clear();
  scheduler.times_disabled = 0;
}

const char* keep(const char* message) {
  scheduler.kept = message;
  return scheduler.kept.c_str();
}

int64_t times_disabled() { return scheduler.times_disabled; }

int64_t times_reached(const std::string& file, int line) {
  int64_t times = 0;
  for (const Reached& place : scheduler.reached) {
    if (place.site.line == line && file == file_name(place.site.file)) times += place.times;
  }
  return times;
}

void forget_reached() { scheduler.reached.clear(); }

Arena::~Arena() {
  for (void* block : blocks_) {
    remove_array(block);
    std::free(block);
  }
}

void* Arena::allocate(int64_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, 256, size_t(bytes)) != 0) throw std::bad_alloc();
  std::memset(block, 0xff, size_t(bytes));
  blocks_.push_back(block);
  add_array(block, size_t(bytes), false, "scratch");
  return block;
}

}  // namespace emulation
