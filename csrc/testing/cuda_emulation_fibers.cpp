// Each thread of a block is a fiber: a stack, switched to and from.
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#include "cuda_emulation_engine.h"

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif

extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));

namespace emulation {

Stacks stacks;

namespace {

constexpr size_t stack_bytes = 256 << 10;

unsigned char* stack_end(int index) {
  const size_t stride = size_t(stacks.end - stacks.begin) / most_threads;
  return stacks.begin + stride * (index + 1);
}

}  // namespace

#ifndef EMULATION_UCONTEXT

extern "C" void emulation_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emulation_switch
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

namespace {

void* stack_pointers[most_threads];
void* scheduler_stack_pointer;

}  // namespace

void prepare_stack(int index, void (*run)()) {
  void** top = reinterpret_cast<void**>(stack_end(index));
  top[-1] = nullptr;  // a return address for `run`, which never returns
  top[-2] = reinterpret_cast<void*>(run);
  for (int saved = 3; saved <= 8; ++saved) top[-saved] = nullptr;
  stack_pointers[index] = top - 8;
}

void enter(int index) { emulation_switch(&scheduler_stack_pointer, stack_pointers[index]); }
void leave(int index) { emulation_switch(&stack_pointers[index], scheduler_stack_pointer); }

#else

namespace {

ucontext_t scheduler_context;
ucontext_t contexts[most_threads];

}  // namespace

void prepare_stack(int index, void (*run)()) {
  ucontext_t& context = contexts[index];
  getcontext(&context);
  context.uc_stack.ss_sp = stack_end(index) - stack_bytes;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, run, 0);
}

void enter(int index) { swapcontext(&scheduler_context, &contexts[index]); }
void leave(int index) { swapcontext(&contexts[index], &scheduler_context); }

#endif

void allocate_stacks() {
  if (stacks.begin != nullptr) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), stride = stack_bytes + page;
  void* memory = mmap(nullptr, stride * most_threads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
  stacks.begin = static_cast<unsigned char*>(memory);
  stacks.end = stacks.begin + stride * most_threads;
  for (int index = 0; index < most_threads; ++index) {  // a page that must not be touched
    if (mprotect(stacks.begin + stride * index, page, PROT_NONE) == 0) continue;
    release_stacks();
    throw std::runtime_error("no more mappings for the threads' stacks");
  }
}

void release_stacks() {
  if (stacks.begin != nullptr) munmap(stacks.begin, size_t(stacks.end - stacks.begin));
  stacks = Stacks();
}

void forget_frames(int count) {
  if (__asan_unpoison_memory_region == nullptr) return;
  for (int index = 0; index < count; ++index) {
    __asan_unpoison_memory_region(stack_end(index) - stack_bytes, stack_bytes);
  }
}

}  // namespace emulation
