// Engines (a variant with its threads and scratch memory), the choice of variants, and the packer.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#include "layout.h"
#include "variant.h"

struct MoeEngine {
    const Variant* variant;
    pthread_mutex_t lock;
    Arena arena;
    Pool pool;
};

namespace {

const Variant* const VARIANTS[] = {&variant_avx2, &variant_avx_vnni, &variant_avx512, &variant_avx512_vnni, &variant_avx512_bf16};
constexpr int COUNT = sizeof VARIANTS / sizeof *VARIANTS;

struct Job {
    const Variant* variant;
    int32_t operation;
    const void* arguments;
    Arena arena;
};

void run_job(Pool& pool, int id, const void* argument) {
    const Job& job = *static_cast<const Job*>(argument);
    job.variant->run({&pool, id, pool.threads}, job.operation, job.arguments, job.arena, nullptr);
}

bool reserve(Arena& arena, int64_t size) {
    if (size <= arena.size) return true;
    free(arena.data);
    arena.size = 0;
    size = (size + (1 << 21) - 1) >> 21 << 21;
    arena.data = static_cast<char*>(aligned_alloc(1 << 21, size));
    if (!arena.data) return false;
    madvise(arena.data, size, MADV_HUGEPAGE);
    arena.size = size;
    return true;
}

uint8_t value_at(const uint8_t* row, int i) { return i & 1 ? row[i / 2] >> 4 : row[i / 2] & 15; }

// Element i of a 64-byte step (lane * 4 + input of the lane), from input `first` of a row on.
void pack_lane(const uint8_t* row, int cols, int first, uint8_t* step, int lane) {
    for (int i = 0; i < 4; i++) {
        if (first + i < cols) step[lane * 4 + i] = value_at(row, first + i);
        if (first + i + 4 < cols) step[lane * 4 + i] |= value_at(row, first + i + 4) << 4;
    }
}

}  // namespace

int32_t moe_supported(void) {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int32_t eax = 7, ebx, ecx = 1, edx;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    bool avx_vnni = avx2 && (eax >> 4 & 1);  // leaf 7, subleaf 1: older compilers do not know them by name
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    bool bf16 = vnni && (eax >> 5 & 1) && __builtin_cpu_supports("avx512vbmi");  // all but the first that have bf16
    return avx2 | avx_vnni << 1 | avx512 << 2 | vnni << 3 | bf16 << 4;
}

const char* moe_variant_name(int32_t index) { return index >= 0 && index < COUNT ? VARIANTS[index]->name : nullptr; }

MoeEngine* moe_open(int32_t variant, int32_t threads) {
    if (variant < 0 || variant >= COUNT || !(moe_supported() >> variant & 1)) return nullptr;
    if (threads < 1 || threads > MAX_THREADS) return nullptr;
    MoeEngine* engine = new (std::nothrow) MoeEngine{};
    if (!engine) return nullptr;
    engine->variant = VARIANTS[variant];
    pthread_mutex_init(&engine->lock, nullptr);
    if (pool_start(engine->pool, threads)) return engine;
    delete engine;
    return nullptr;
}

void moe_close(MoeEngine* engine) {
    pool_stop(engine->pool);
    pthread_mutex_destroy(&engine->lock);
    free(engine->arena.data);
    delete engine;
}

int32_t moe_run(MoeEngine* engine, int32_t operation, const void* arguments) {
    if (operation < 0 || operation >= MOE_OPERATIONS) return EINVAL;
    pthread_mutex_lock(&engine->lock);
    int64_t needed = 0;
    engine->variant->run({&engine->pool, 0, engine->pool.threads}, operation, arguments, Arena{}, &needed);
    bool enough = reserve(engine->arena, needed);
    if (enough) {
        Job job{engine->variant, operation, arguments, engine->arena};
        pool_run(engine->pool, run_job, &job);
    }
    pthread_mutex_unlock(&engine->lock);
    return enough ? 0 : ENOMEM;
}

int64_t moe_argument_bytes(int32_t operation) {
    const int64_t sizes[] = {sizeof(MoeQuantizeArgs), sizeof(MoeLinearArgs), sizeof(MoeHeadsArgs), sizeof(MoeExpertsArgs),
                             sizeof(MoeRouteArgs), sizeof(MoeLatentArgs), sizeof(MoeAttendArgs), sizeof(MoeForwardArgs)};
    return operation >= 0 && operation < MOE_OPERATIONS ? sizes[operation] : 0;
}

int64_t moe_packed_bytes(int32_t rows, int32_t cols, int32_t group, int32_t bits, int32_t paired) {
    return block_bytes(cols, group, bits) * block_count(rows, paired);
}

void moe_pack(const uint8_t* values, const float* scales, const uint8_t* zeros, uint8_t* data, uint8_t* zeros_out,
              int32_t rows, int32_t cols, int32_t group, int32_t paired) {
    const int groups = ceil_div(cols, group), blocks = block_count(rows, paired), part = paired ? rows / 2 : rows;
    memset(data, 0, block_bytes(cols, group, 4) * blocks);
    for (int block = 0; block < blocks; block++)
        for (int g = 0; g < groups; g++) {
            int steps = steps_for(g * group + group < cols ? group : cols - g * group, 4);
            for (int lane = 0; lane < BLOCK; lane++) {
                int at = (paired ? block / 2 : block) * BLOCK + lane;
                if (at >= part) continue;
                int64_t row = at + (paired && block % 2 ? part : 0);
                memcpy(data + lane * 4, &scales[row * groups + g], 4);
                if (zeros) zeros_out[(int64_t(block) * groups + g) * BLOCK + lane] = zeros[row * groups + g];
                const uint8_t* from = values + row * ((cols + 1) / 2);
                for (int s = 0; s < steps; s++) pack_lane(from, cols, g * group + s * 8, data + 64 + s * 64, lane);
            }
            data += 64 * (steps + 1);
        }
}
