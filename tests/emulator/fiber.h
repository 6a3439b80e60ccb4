// Fibers: functions with stacks of their own, which run in turn on one thread of the host. The emulators of GPUs run
// the threads of a GPU in fibers.
#ifndef TURBOQUANT_TESTS_FIBER_H
#define TURBOQUANT_TESTS_FIBER_H

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
#if defined(__x86_64__)
    void * at = nullptr; // the stack pointer of a fiber that does not run
#else
    ucontext_t at;
#endif
    // Makes the fiber begin with `entry`, which must not return, at the upper end of a stack.
    void start(void * stack, size_t bytes, void (*entry)());
};

// Continues `to`. Returns when another fiber switches to `from`, which stands for the caller.
void switch_fiber(Fiber & from, Fiber & to);

} // namespace emulator

#endif
