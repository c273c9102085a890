// Scratch memory of an engine, laid out anew for every call and kept between them.
#pragma once
#include <stdint.h>

struct Arena {
    char* data;
    int64_t size, used;

    // With data null it only counts, so that the same code measures and lays out.
    template <class T>
    T* take(int64_t count) {
        char* at = data ? data + used : nullptr;
        used += (count * int64_t(sizeof(T)) + 127) / 64 * 64;  // room to read one vector behind the end
        return reinterpret_cast<T*>(at);
    }
};
