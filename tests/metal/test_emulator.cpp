// Tests that the emulator stops kernels with mistakes, with the right message, and runs those without.
#include "check.h"
#include "device.h"

#include <string>
#include <sys/wait.h>
#include <unistd.h>

namespace {

struct Run {
    const char * kernel;
    int threadgroup_bytes;
    bool barrier; // between the first dispatch and a second one
    int dispatches;
};

void execute(const Run & run) {
    const DeviceArray<float> data(128);
    const int nothing = 0;
    EmulatorEncoder encoder;
    for (int i = 0; i < run.dispatches; ++i) {
        if (i > 0 && run.barrier) encoder.barrier();
        encoder.dispatch({run.kernel, {}, &nothing, sizeof(nothing), {data.buffer()}, size_t(run.threadgroup_bytes),
                          {2, 1, 1}, 64});
    }
}

// What the emulator prints before it stops; empty if the kernel runs to its end.
std::string message_of(const Run & run) {
    int ends[2];
    if (pipe(ends) != 0) return "no pipe";
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        execute(run);
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char part[256];
    for (ssize_t n; (n = read(ends[0], part, sizeof(part))) > 0;) text.append(part, size_t(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : text;
}

void stops(const Run & run, const char * wanted) {
    check::Case c(run.kernel, ", ", run.dispatches, " dispatches");
    const std::string text = message_of(run);
    if (!CHECK(*wanted ? text.find(wanted) != std::string::npos : text.empty()))
        std::fprintf(stderr, "wanted \"%s\", got \"%s\"\n", wanted, text.c_str());
}

} // namespace

int main() {
    stops({"write_all", 256, true, 1}, "");
    stops({"write_beyond", 256, true, 1}, "in no allocation");
    stops({"exchange", 256, true, 1}, "");
    stops({"exchange", 128, true, 1}, "in no allocation"); // less memory than the kernel uses
    stops({"exchange_unwritten", 256, true, 1}, "which was not written");
    stops({"exchange_without_barrier", 256, true, 1}, "which was not written");
    stops({"exchange_in_simd_group", 256, true, 1}, "");
    stops({"reverse", 256, true, 1}, "");
    stops({"reverse_without_barrier", 256, true, 1}, "which was not written");
    stops({"read_next", 256, true, 1}, "which thread 0 has written since the last barrier");
    stops({"overwrite", 256, true, 1}, "");
    stops({"overwrite_without_barrier", 256, true, 1}, "which another thread has read since the last barrier");
    stops({"meet_at_barrier", 256, true, 1}, "");
    stops({"miss_barrier", 256, true, 1}, "waits at a barrier in line 0 (0: has ended)");
    stops({"sum_lanes", 256, true, 1}, "");
    stops({"sum_half", 256, true, 1}, "other lanes do not reach the function");
    stops({"write_apart", 256, true, 1}, "");
    stops({"write_together", 256, true, 1}, "which another thread has written");
    stops({"write_all", 256, true, 2}, "");
    stops({"write_all", 256, false, 2}, "which another thread has written");
    stops({"no_such_kernel", 256, true, 1}, "there is no such kernel");
    return check::summary();
}
