// turbo-devices.h: devices that hold a cache which they could not use. Part of libllama.
#pragma once

struct turbo_layer_types;

// Ask the devices that hold the cache whether they can fill it and read it; false, with a line in the log, if one cannot.
// Without this the scheduler aborts at the first graph: the cache is allocated already, so it cannot fall back to the CPU.
bool turbo_check_devices(const turbo_layer_types & chosen, bool flash_attention);
