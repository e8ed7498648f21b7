// What the kernels over repacked 4-bit weights share.
#pragma once

#include "sixteen_bit.cuh"

__device__ __forceinline__ uint4 load_codes(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Left operands of the four products in 16 bytes of codes: feature g in x, y; feature g + 8 in z, w.
__device__ __forceinline__ void decode_exactly(u32 (&a)[4][4], const uint4& codes, float low, float high, const char* table,
                                       u32 lane8) {
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const u32 word = words[i / 4];
        const int byte = i % 4;  // entry `byte` starts 128 bytes times the code in
        const u32 shifted = byte == 0 ? word << 7 : word >> (byte * 8 - 7);
        const float2 value = *reinterpret_cast<const float2*>(table + ((shifted & 0x7f80u) | lane8));
        const float by = i < 8 ? low : high;
        a[i % 8 / 2][(i / 8) + 2 * (i % 2)] = narrow(value.x * by, value.y * by);
    }
}

// Copies of the 256 pairs, one for each two banks of shared memory: entry b of copy c is at 128 b + 8 c.
__device__ __forceinline__ void fill_table(char* table, const float2* pairs, u32 thread, u32 threads) {
    for (u32 entry = thread; entry < 256; entry += threads) {
        const float2 pair = pairs[entry];
        const float4 two = {pair.x, pair.y, pair.x, pair.y};
#pragma unroll
        for (int i = 0; i < 8; i++) reinterpret_cast<float4*>(table)[entry * 8 + (i + thread) % 8] = two;
    }
}
