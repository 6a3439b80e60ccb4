// turbo-record.h: the records that this project's programs print as lines of JSON to stdout.
#pragma once

#include <cstdio>
#include <string>

inline std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
        }
        out += (unsigned char) c < 0x20 ? ' ' : c;
    }
    return out + '"';
}

// Flushes, because the reader shows progress.
inline void emit(const std::string & line) {
    std::fwrite(line.data(), 1, line.size(), stdout);
    std::fputc('\n', stdout);
    std::fflush(stdout);
}
