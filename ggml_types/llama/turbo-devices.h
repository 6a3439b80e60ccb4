// turbo-devices.h: devices that hold a cache which they could not use. Part of libllama.
#pragma once

struct turbo_layer_types;

// Ask the devices that hold the cache whether they can fill it and read it; false, with a line in the log, if one cannot.
// Without this the scheduler aborts at the first graph: the cache is allocated already, so it cannot fall back to the CPU.
bool turbo_check_devices(const turbo_layer_types & chosen, bool flash_attention);

// Gives an exact window to the layers that can have one: with a turbo type, read by no other layer, and with a cache on a
// device whose attention reads windows. `offloaded`: caches are on their layers' devices, else in the CPU's memory.
void turbo_choose_windows(turbo_layer_types & chosen, bool offloaded);
