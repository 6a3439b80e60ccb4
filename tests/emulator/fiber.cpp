#include "fiber.h"

#include <cstdint>
#include <cstring>

namespace emulator {

#if defined(__x86_64__)
extern "C" void emulator_switch(void ** from, void * to);
asm(".text\n.globl emulator_switch\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

void Fiber::start(void * stack, size_t bytes, void (*entry)()) {
    const uintptr_t end = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15);
    void ** top = reinterpret_cast<void **>(end) - 3;
    *--top = reinterpret_cast<void *>(entry); // ret enters the function with the stack aligned as after a call
    at = top - 6;
    std::memset(at, 0, 6 * sizeof(void *));
}
void switch_fiber(Fiber & from, Fiber & to) { emulator_switch(&from.at, to.at); }
#else
void Fiber::start(void * stack, size_t bytes, void (*entry)()) {
    getcontext(&at);
    at.uc_stack.ss_sp = stack;
    at.uc_stack.ss_size = bytes;
    at.uc_link = nullptr;
    makecontext(&at, entry, 0);
}
void switch_fiber(Fiber & from, Fiber & to) { swapcontext(&from.at, &to.at); }
#endif

} // namespace emulator
