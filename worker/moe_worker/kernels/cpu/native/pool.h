// Threads that run one job together. They spin for a moment between jobs and at barriers, then sleep: a decode
// step has a hundred short phases, and waking a thread takes as long as ten of them.
#pragma once
#include <pthread.h>
#include <stdint.h>

constexpr int MAX_THREADS = 256;

struct Pool {
    typedef void (*Job)(Pool&, int, const void*);
    int threads;
    Job job;
    const void* argument;
    alignas(64) uint32_t started;    // changes when a job is there
    alignas(64) uint32_t finished;   // changes when a barrier is passed
    alignas(64) uint32_t arrived;
    alignas(64) uint32_t sleepers;
    alignas(64) int32_t next;        // next item of the phase's loop
    bool stop;
    pthread_t handles[MAX_THREADS];
};

bool pool_start(Pool& pool, int threads);
void pool_stop(Pool& pool);
void pool_run(Pool& pool, Pool::Job job, const void* argument);
// All threads meet here; afterwards the loop counter stands at 0.
void pool_barrier(Pool& pool);

// What a kernel knows of the thread that runs it.
struct Context {
    Pool* pool;
    int id, threads;

    void sync() const { pool_barrier(*pool); }

    // Takes the next `grain` of `items` from the loop that all threads share (one loop between two syncs).
    bool take(int items, int grain, int& begin, int& end) const {
        begin = __atomic_fetch_add(&pool->next, grain, __ATOMIC_RELAXED);
        end = begin + grain < items ? begin + grain : items;
        return begin < items;
    }
    // A grain that gives every thread about three turns, so that a slowed core does not hold up the others.
    int grain(int items) const {
        int grain = items / (threads * 3);
        return grain > 0 ? grain : 1;
    }
};
