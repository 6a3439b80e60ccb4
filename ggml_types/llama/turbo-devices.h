// turbo-devices.h: refuses devices that hold a cache but cannot use it. Part of libllama.
#pragma once

struct turbo_layer_types;

// Asks the devices that hold the cache whether they can write and read it; false, with a line in the log, if one cannot.
// Without this check the scheduler aborts at the first graph: it cannot fall back to the CPU, because the cache is already
// allocated.
bool turbo_check_devices(const turbo_layer_types & chosen, bool flash_attention);

// Gives an exact window to the layers that can have one: with a turbo type, read by no other layer, and with a cache on a
// device whose attention reads windows. `offloaded`: caches are on their layers' devices, else in the CPU's memory.
void turbo_choose_windows(turbo_layer_types & chosen, bool offloaded);
