// The fibers behind device.h.
#include "device.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

extern char shared_begin[] __asm__("__start_shared_memory") __attribute__((weak));
extern char shared_end[] __asm__("__stop_shared_memory") __attribute__((weak));

namespace on_cpu {

Machine machine;

namespace {

// To ThreadSanitizer: whether a block starts when the one before has ended. On a GPU it does not.
const bool blocks_in_order = !std::getenv("BLOCKS_IN_ANY_ORDER");

// Leaves the callee-saved registers on the stack, whose pointer goes to *from, and goes on where `to` stopped.
__attribute__((naked, noinline, no_sanitize("address"), no_sanitize("thread"))) void swap_stacks(void**, void*) {
#if defined(__x86_64__)
  __asm__(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
#else
#error "x86-64 only"
#endif
}

UNSEEN void resume(Fiber& f) {
  Machine& m = machine;
  m.current = &f;
  threadIdx = {f.thread, 0, 0};
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.fake_stack, f.stack, kStack);
#endif
  swap_stacks(&m.stack_pointer, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
#endif
}

UNSEEN void pause() {
  Machine& m = machine;
  Fiber& f = *m.current;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(m.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.fake_stack, m.stack, m.stack_size);
#endif
  swap_stacks(&f.stack_pointer, m.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &m.stack, &m.stack_size);
#endif
}

UNSEEN void complete(Meeting& meeting, unsigned expected) {
  if (meeting.arrived && meeting.arrived == expected) meeting.arrived = 0, ++meeting.generation;
}

UNSEEN void leave() {
  machine.current->running = false;
  --machine.alive;
  complete(*machine.block, machine.alive);  // nobody waits for a thread that has returned
}

// The life of a fiber: a thread of this block, then of another.
void live() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_size);
#endif
  for (;;) {
    acquire(&machine.launched);
    machine.body(machine.arguments);
    release(&machine.finished);
    leave();
    pause();
  }
}

UNSEEN void create(Fiber& f) {
  f.stack = static_cast<char*>(std::aligned_alloc(4096, kStack));
  void** top = reinterpret_cast<void**>(f.stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&live);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
  f.tsan = __tsan_create_fiber(0);
#endif
}

UNSEEN void run_block(unsigned set) {
  Machine& m = machine;
  Fiber* const fibers = m.fibers[set];
  m.block = &m.meetings[set];
  for (volatile char* c = shared_begin; c != shared_end; ++c) *c = -1;
  *m.block = {};
  for (auto& warp : m.warps) warp.meeting = {};
  m.alive = m.threads;
  for (unsigned t = 0; t < m.threads; ++t) {
    if (!fibers[t].stack) create(fibers[t]);
    fibers[t].thread = t;
    fibers[t].running = true;
    fibers[t].at = nullptr;
  }
  for (bool moved = true; m.alive;) {
    if (!moved) fail("threads wait where others do not come");
    moved = false;
    for (unsigned n = 0; n < m.threads; ++n) {
      Fiber& f = fibers[m.order % 3 == 0 ? n : m.order % 3 == 1 ? m.threads - 1 - n : (7 * n + 5) % m.threads];
      if (f.ready()) resume(f), moved = true;
    }
  }
}

}  // namespace

void fail(const char* what, int a, int b) {
  std::fprintf(stderr, "on_cpu: %s (%d, %d) in thread %u of block (%u, %u)\n", what, a, b, threadIdx.x, blockIdx.x,
               blockIdx.y);
  std::abort();
}

UNSEEN void meet(Meeting& meeting, unsigned expected, int line) {
  if (meeting.arrived && meeting.line != line) fail("threads meet at different lines", meeting.line, line);
  meeting.line = line;
  ++meeting.arrived;
  Fiber& f = *machine.current;
  f.at = &meeting;
  f.generation = meeting.generation;
  complete(meeting, expected);
  while (meeting.generation == f.generation) pause();
  f.at = nullptr;
}

// A lane's value is left in a slot for the others. No order of other memory follows from that, as on the GPU.
UNSEEN void exchange(void* value, size_t size, unsigned partner, int line) {
  const unsigned thread = machine.current->thread;
  Warp& warp = machine.warps[thread / kLanes];
  auto& slots = warp.slot[warp.meeting.generation % 2];
  for (size_t i = 0; i < size; ++i) slots[thread % kLanes][i] = static_cast<char*>(value)[i];
  meet(warp.meeting, kLanes, line);
  for (size_t i = 0; i < size; ++i) static_cast<char*>(value)[i] = slots[partner][i];
}

UNSEEN void launch(dim3 grid, dim3 block, void (*body)(const void*), const void* arguments) {
  Machine& m = machine;
  if (!grid.x || grid.x >> 31 || !grid.y || grid.y > 65535 || grid.z != 1) fail("bad grid", grid.x, grid.y);
  if (!block.x || block.x > kMaxThreads || block.x % kLanes || block.y * block.z != 1) fail("bad block", block.x);
  gridDim = grid, blockDim = block, m.threads = block.x;
  m.body = body, m.arguments = arguments;
  ++m.order;
#if defined(__SANITIZE_THREAD__)
  m.tsan = __tsan_get_current_fiber();
#endif
  release(&m.launched);
  for (unsigned n = 0, count = grid.x * grid.y; n < count; ++n) {
    const unsigned b = m.order % 2 ? n : count - 1 - n;  // the last to arrive is not always the same
    blockIdx = {b % grid.x, b / grid.x, 0};
    run_block(blocks_in_order ? 0 : n % kSets);
    if (blocks_in_order) acquire(&m.finished), release(&m.launched);
  }
  acquire(&m.finished);
}

}  // namespace on_cpu
