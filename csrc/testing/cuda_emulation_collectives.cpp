// Barriers, warp collectives, asynchronous copies.
#include <algorithm>
#include <cstring>

#include "cuda_emulation_engine.h"

namespace emulation {
namespace {

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

Thread& self() { return engine.threads[engine.current]; }

// Ends the turn of the running thread.
void wait() { leave(engine.current); }

std::string lane_list(uint32_t lanes) {
  std::string list;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) list += (list.empty() ? "" : ", ") + std::to_string(lane);
  }
  return list;
}

// The lanes that a collective of `thread` waits for, by where they are.
struct Missing {
  uint32_t gone = 0, elsewhere = 0;
  const Thread* other = nullptr;  // one of those elsewhere, in a block's barrier if any is
};

Missing missing_lanes(int index) {
  const Thread& thread = engine.threads[index];
  Missing missing;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(thread.mask >> lane & 1)) continue;
    const Thread& peer = engine.threads[index / 32 * 32 + lane];
    const bool here =
        peer.state == State::collective && peer.mask == thread.mask && same(peer.site, thread.site);
    if (here) continue;
    (peer.state == State::exited ? missing.gone : missing.elsewhere) |= 1u << lane;
    if (peer.state == State::exited) continue;
    if (missing.other == nullptr || peer.state == State::barrier) missing.other = &peer;
  }
  return missing;
}

}  // namespace

void explain_standstill() {
  int deadlocked = -1;
  for (int index = 0; index < engine.count; ++index) {
    const Thread& thread = engine.threads[index];
    if (thread.state != State::collective) continue;
    const Missing missing = missing_lanes(index);
    if (missing.gone == 0 && missing.other->state == State::collective) {
      if (deadlocked < 0) deadlocked = index;
      continue;
    }
    std::string what = std::string("collective with missing lanes: ") + thread.waits + " names";
    if (missing.gone != 0) what += " lanes " + lane_list(missing.gone) + " that left the kernel";
    if (missing.elsewhere != 0) {
      what += std::string(missing.gone != 0 ? " and" : "") + " lanes " +
              lane_list(missing.elsewhere) + " that wait elsewhere, one in " +
              missing.other->waits + " at " + text(Where{missing.other->site, nullptr});
    }
    return fault(what, {thread.site, nullptr}, index);
  }
  // Somebody waits in a collective: a barrier that all are in ends, one that some missed is a
  // fault.
  const Thread& thread = engine.threads[deadlocked];
  const Missing missing = missing_lanes(deadlocked);
  fault(std::string("deadlock: ") + thread.waits + " waits for lanes " +
            lane_list(missing.elsewhere) + ", one of which waits in " + missing.other->waits +
            " at " + text(Where{missing.other->site, nullptr}),
        {thread.site, nullptr}, deadlocked);
}

int barrier(Vote vote, bool predicate, Site site) {
  if (is_disabled(site)) return predicate;
  constexpr const char* names[] = {"__syncthreads", "__syncthreads_and", "__syncthreads_or",
                                   "__syncthreads_count"};
  Thread& thread = self();
  thread.waits = names[int(vote)];
  thread.site = site;
  if (engine.exited > 0) {
    fault(std::string("barrier with exited threads: ") + std::to_string(engine.exited) +
              " threads of the block have left the kernel before this " + thread.waits,
          {site, nullptr});
  }
  if (engine.arrived > 0) {
    for (int index = 0; index < engine.count; ++index) {
      const Thread& other = engine.threads[index];
      if (other.state != State::barrier) continue;
      if (!same(other.site, site)) {
        fault(std::string("divergent barrier: this thread waits in ") + thread.waits + ", thread " +
                  text(other.index) + " waits in " + other.waits + " at " +
                  text(Where{other.site, nullptr}),
              {site, nullptr});
      }
      break;
    }
  }
  engine.votes += predicate;
  if (++engine.arrived < engine.count) {
    thread.state = State::barrier;
    wait();
  } else {
    engine.decided = engine.votes;
    engine.arrived = engine.votes = 0;
    for (int index = 0; index < engine.count; ++index) engine.threads[index].state = State::ready;
    memory_barrier();
    shuffle_sequence();
  }
  if (vote == Vote::all) return engine.decided == engine.count;
  if (vote == Vote::any) return engine.decided > 0;
  return engine.decided;
}

void collective(const char* name, uint32_t mask, void* brought, Work work, Site site) {
  Thread& thread = self();
  const int lane = engine.current % 32, first = engine.current - lane;
  if (!(mask >> lane & 1)) {
    fault(std::string("collective with missing lanes: ") + name + " is called by lane " +
              std::to_string(lane) + ", which its mask leaves out",
          {site, nullptr});
  }
  thread.waits = name;
  thread.site = site;
  thread.mask = mask;
  thread.brought = brought;
  bool complete = true;
  for (int peer = 0; peer < 32; ++peer) {
    if (!(mask >> peer & 1) || peer == lane) continue;
    const Thread* other = first + peer < engine.count ? &engine.threads[first + peer] : nullptr;
    if (other == nullptr || other->state == State::exited) {
      fault(std::string("collective with missing lanes: ") + name + " names lane " +
                std::to_string(peer) +
                (other == nullptr ? ", which the block does not have"
                                  : ", which has left the kernel"),
            {site, nullptr});
    }
    const bool waits = other->state == State::collective && other->mask == mask;
    if (waits && (!same(other->site, site) || std::strcmp(other->waits, name) != 0)) {
      fault(std::string("collective with missing lanes: ") + name + " names lane " +
                std::to_string(peer) + ", which waits in " + other->waits + " at " +
                text(Where{other->site, nullptr}),
            {site, nullptr});
    }
    complete &= waits;
  }
  if (!complete) {
    thread.state = State::collective;
    return wait();
  }
  void* lanes[32] = {};
  for (int peer = 0; peer < 32; ++peer) {
    if (!(mask >> peer & 1)) continue;
    lanes[peer] = engine.threads[first + peer].brought;
    engine.threads[first + peer].state = State::ready;
  }
  work(lanes, first, site);
}

void warp_barrier(uint32_t mask, Site site) {
  if (is_disabled(site)) return;
  uint32_t brought = mask;
  collective(
      "__syncwarp", mask, &brought,
      [](void* const(&lanes)[32], int first, Site) {
        const uint32_t* mask = nullptr;
        for (void* lane : lanes) mask = lane != nullptr ? static_cast<uint32_t*>(lane) : mask;
        memory_warp_barrier(first, *mask);
      },
      site);
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site) {
  uint32_t brought = predicate;
  collective(
      name, mask, &brought,
      [](void* const(&lanes)[32], int, Site) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] != nullptr) votes |= *static_cast<uint32_t*>(lanes[lane]) << lane;
        }
        for (void* lane : lanes) {
          if (lane != nullptr) *static_cast<uint32_t*>(lane) = votes;
        }
      },
      site);
  return brought;
}

namespace {

struct Shuffled {
  Shuffle mode;
  uint64_t bits, received;
  int operand, width;
};

int source_lane(const Shuffled& asked, int lane) {
  const int first = lane & ~(asked.width - 1), last = first + asked.width - 1;
  int source = lane;
  if (asked.mode == Shuffle::index) return first + (asked.operand & (asked.width - 1));
  if (asked.mode == Shuffle::up) source = lane - asked.operand;
  if (asked.mode == Shuffle::down) source = lane + asked.operand;
  if (asked.mode == Shuffle::exclusive_or) source = lane ^ asked.operand;
  const bool below = asked.mode == Shuffle::up && source < first;
  return below || source > last ? lane : source;
}

}  // namespace

uint64_t shuffle(Shuffle mode, uint32_t mask, uint64_t bits, int operand, int width, Site site) {
  Shuffled brought{mode, bits, 0, operand, width};
  collective(
      "__shfl_sync", mask, &brought,
      [](void* const(&lanes)[32], int first, Site site) {
        for (int lane = 0; lane < 32; ++lane) {
          if (lanes[lane] == nullptr) continue;
          Shuffled& asked = *static_cast<Shuffled*>(lanes[lane]);
          const int source = source_lane(asked, lane);
          if (lanes[source] == nullptr) {
            return fault("collective with missing lanes: a shuffle takes from lane " +
                             std::to_string(source) + ", which its mask leaves out",
                         {site, nullptr}, first + lane);
          }
          asked.received = static_cast<Shuffled*>(lanes[source])->bits;
        }
      },
      site);
  return brought.received;
}

// Asynchronous copies -----------------------------------------------------------------------------

void cp_async_16(void* shared, const void* global, int source_bytes, Site site) {
  if (source_bytes < 0 || source_bytes > 16) {
    fault("cp.async of " + std::to_string(source_bytes) + " bytes into 16", {site, nullptr});
  }
  if (!is_shared(shared, 16)) {
    fault("cp.async out of bounds: its 16 bytes do not lie in shared memory", {site, nullptr});
  }
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fault("misaligned cp.async: its source is not a multiple of 16", {site, nullptr});
  }
  if (source_bytes > 0) access(global, size_t(source_bytes), Access::read, {site, nullptr});
  access(shared, 16, Access::write, {site, nullptr}, -1, 16);
  memory_copy_issued(shared, 16, site);
  self().open.push_back({shared, global, source_bytes, site});
}

void cp_async_commit() {
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void cp_async_wait(int groups_left, Site site) {
  if (is_disabled(site)) return;
  std::vector<CopyGroup>& groups = self().groups;
  while (int(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, size_t(16 - copy.bytes));
      memory_copy_arrived(copy.to, 16, copy.site);
    }
    groups.erase(groups.begin());
  }
}

// Barriers of copies ------------------------------------------------------------------------------

namespace {

CopyBarrier& barrier_at(void* address, Site site) {
  const auto found = engine.copy_barriers.find(address);
  if (found == engine.copy_barriers.end()) {
    fault("an mbarrier that nobody has initialized", {site, nullptr});
  }
  return found->second;
}

// Ends the barrier's phase if all that it waits for is here.
bool end_phase(CopyBarrier& barrier) {
  if (barrier.arrived < barrier.count || barrier.announced != barrier.issued) return false;
  for (const Copy& copy : barrier.copies) {
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    memory_bulk_arrived(copy.to, size_t(copy.bytes));
  }
  barrier = {barrier.count, 0, barrier.phase + 1, 0, 0, {}};
  return true;
}

constexpr int most_turns = 10000;

}  // namespace

void mbarrier_init(void* barrier, int count, Site site) {
  if (!is_shared(barrier, 8)) fault("an mbarrier outside of shared memory", {site, nullptr});
  engine.copy_barriers[barrier] = {count, 0, 0, 0, 0, {}};
}

void mbarrier_arrive_expecting(void* address, int bytes, Site site) {
  CopyBarrier& barrier = barrier_at(address, site);
  if (++barrier.arrived > barrier.count) {
    fault("an mbarrier with more arrivals than it has places", {site, nullptr});
  }
  barrier.announced += bytes;
}

void mbarrier_wait(void* address, int parity, Site site) {
  if (is_disabled(site)) return;
  Thread& thread = self();
  for (int turn = 0; barrier_at(address, site).phase % 2 == parity; ++turn) {
    // Copies land late: all other threads run up to a wait of their own first.
    if (turn > 0 && end_phase(barrier_at(address, site))) break;
    if (turn == most_turns) {
      const CopyBarrier& barrier = barrier_at(address, site);
      fault("deadlock: mbarrier with " + std::to_string(barrier.arrived) + " of " +
                std::to_string(barrier.count) + " arrivals, " + std::to_string(barrier.issued) +
                " of " + std::to_string(barrier.announced) + " bytes",
            {site, nullptr});
    }
    thread.state = State::ready;
    wait();
  }
}

void bulk_copy(void* shared, const void* global, int bytes, void* barrier, Site site) {
  if (bytes <= 0 || bytes % 16 != 0 || !is_shared(shared, size_t(bytes))) {
    fault("bulk copy of " + std::to_string(bytes) + " bytes that do not lie in shared memory",
          {site, nullptr});
  }
  for (const void* address : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
      fault("misaligned bulk copy: an address is not a multiple of 16", {site, nullptr});
    }
  }
  access(global, size_t(bytes), Access::read, {site, nullptr});
  access(shared, size_t(bytes), Access::write, {site, nullptr}, -1, 16);
  memory_copy_issued(shared, size_t(bytes), site);
  CopyBarrier& waited_for = barrier_at(barrier, site);
  waited_for.issued += bytes;
  waited_for.copies.push_back({shared, global, bytes, site});
}

}  // namespace emulation
