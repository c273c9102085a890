// What a translation unit, compiled for one instruction set, offers.
#pragma once
#include "arena.h"
#include "interface.h"
#include "pool.h"

struct Variant {
    const char* name;
    // Runs an operation on the calling thread of the pool. With arena.data null it only counts the scratch memory.
    void (*run)(const Context& context, int32_t operation, const void* arguments, Arena arena, int64_t* needed);
};

extern const Variant variant_avx2, variant_avx_vnni, variant_avx512, variant_avx512_vnni, variant_avx512_bf16;
