// turbo-record.h: the records that our programs print: lines of JSON on stdout.
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

// At once: whoever reads the records shows progress.
inline void emit(const std::string & line) {
    std::fwrite(line.data(), 1, line.size(), stdout);
    std::fputc('\n', stdout);
    std::fflush(stdout);
}
