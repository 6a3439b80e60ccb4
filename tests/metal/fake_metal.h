// What the fake Metal device has executed.
#ifndef TURBOQUANT_TESTS_FAKE_METAL_H
#define TURBOQUANT_TESTS_FAKE_METAL_H

#include <map>
#include <string>

extern std::map<std::string, int> fake_metal_dispatches; // by kernel
extern double fake_metal_error;   // the largest relative error of a row of attention, against double precision
extern int fake_metal_wrong_rows; // that SET_ROWS has not stored with the CPU's bytes

#endif
