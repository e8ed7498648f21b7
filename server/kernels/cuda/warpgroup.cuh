// What the kernels on Hopper's warpgroup matrix instructions share. SPLITS blocks of threads make a cluster.
#pragma once

#include "sixteen_bit.cuh"

// Rows of 128 bytes, eight of them to an atom of 1024 in which 16-byte pieces are swizzled by the row.
__device__ __forceinline__ u64 descriptor(u32 shared) {
    return (u64)((shared & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

struct __align__(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ void wait_phase(u32 barrier, u32 phase) {
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                 ::"r"(barrier), "r"(phase) : "memory");
}

// One thread of a warp.
__device__ __forceinline__ bool elected() {
    u32 is;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is));
    return is;
}

template <int pending>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ float4 read_part(u32 at, u32 part) {
    u32 there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(part));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there));
    return v;
}

__device__ __forceinline__ void meet() {
    if (SPLITS == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
}
