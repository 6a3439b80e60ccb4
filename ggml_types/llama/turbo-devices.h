// turbo-devices.h: refuses devices that hold a cache but cannot use it, and gives exact windows to the layers whose
// devices can read them. Part of libllama.
#pragma once

#include "ggml.h"

struct turbo_layer_types;
struct turbo_model;

// The type of K and V that auto stands for where there is no plan: turbo4_tcq in the CPU's memory, and turbo4 if another
// device holds a part of the cache, because GPUs compute attention over turbo4 faster. offloaded: whether caches are on the
// devices of their layers.
ggml_type turbo_auto_type(const turbo_model & model, bool offloaded);

// Asks the devices of the layers whether they can store rows in a cache of the selected types and compute attention
// over it. False, with a line in the log, if one cannot, or if it is a remote device (RPC), which cannot be asked, and
// TURBOQUANT_RPC is not set. Without this check the scheduler would abort at the first graph: it cannot fall back to
// the CPU, because the cache is already allocated. flash_attention: whether attention is FLASH_ATTN_EXT, else a matrix
// product with K.
bool turbo_check_devices(const turbo_layer_types & chosen, bool flash_attention);

// Sets chosen.windowed: which layers have an exact window. A layer has one if its K or V has a turbo type, no other
// layer reads its cache, and attention on the device of its cache reads windows; a line in the log names the layers
// whose devices do not. There are no windows if their length is 0, for multi-head latent attention, and for
// architectures with attention code of their own. offloaded: whether caches are on the devices of their layers, else in
// the CPU's memory.
void turbo_choose_windows(turbo_layer_types & chosen, bool offloaded);
