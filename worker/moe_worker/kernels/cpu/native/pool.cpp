#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <limits.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int SPINS_AT_BARRIER = 4000;    // some 50 us: longer than any phase of a decode step is uneven
constexpr int SPINS_BETWEEN_JOBS = 20000; // covers sampling between two steps

struct Start {
    Pool* pool;
    int id;
};

long futex(uint32_t* word, int operation, uint32_t value) {
    return syscall(SYS_futex, word, operation, value, nullptr, nullptr, 0);
}

void wait_change(Pool& pool, uint32_t& word, uint32_t old, int spins) {
    for (int i = 0; i < spins; i++) {
        if (__atomic_load_n(&word, __ATOMIC_ACQUIRE) != old) return;
        _mm_pause();
    }
    // Counted before the kernel looks at the word again: whoever changes it then sees a sleeper and wakes it.
    __atomic_fetch_add(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&word, __ATOMIC_SEQ_CST) == old) futex(&word, FUTEX_WAIT_PRIVATE, old);
    __atomic_fetch_sub(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
}

void announce(Pool& pool, uint32_t& word) {
    __atomic_fetch_add(&word, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool.sleepers, __ATOMIC_SEQ_CST) > 0) futex(&word, FUTEX_WAKE_PRIVATE, INT_MAX);
}

void* work(void* argument) {
    Start start = *static_cast<Start*>(argument);
    delete static_cast<Start*>(argument);
    Pool& pool = *start.pool;
    for (uint32_t seen = 0;; seen++) {
        wait_change(pool, pool.started, seen, SPINS_BETWEEN_JOBS);
        if (pool.stop) return nullptr;
        pool.job(pool, start.id, pool.argument);
        pool_barrier(pool);
    }
}

}  // namespace

void pool_barrier(Pool& pool) {
    if (pool.threads == 1) {
        pool.next = 0;
        return;
    }
    uint32_t turn = __atomic_load_n(&pool.finished, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&pool.arrived, 1, __ATOMIC_ACQ_REL) == uint32_t(pool.threads)) {
        pool.arrived = 0;
        pool.next = 0;
        announce(pool, pool.finished);
    } else {
        wait_change(pool, pool.finished, turn, SPINS_AT_BARRIER);
    }
}

bool pool_start(Pool& pool, int threads) {
    pool.threads = threads;
    pool.started = pool.finished = pool.arrived = pool.sleepers = 0;
    pool.next = 0;
    pool.stop = false;
    for (int id = 1; id < threads; id++) {
        Start* start = new Start{&pool, id};
        if (pthread_create(&pool.handles[id], nullptr, work, start) != 0) {
            delete start;
            pool.threads = id;
            pool_stop(pool);
            return false;
        }
    }
    return true;
}

void pool_stop(Pool& pool) {
    pool.stop = true;
    announce(pool, pool.started);
    for (int id = 1; id < pool.threads; id++) pthread_join(pool.handles[id], nullptr);
}

void pool_run(Pool& pool, Pool::Job job, const void* argument) {
    pool.job = job;
    pool.argument = argument;
    pool.next = 0;
    if (pool.threads > 1) announce(pool, pool.started);
    job(pool, 0, argument);
    pool_barrier(pool);
}
