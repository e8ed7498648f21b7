// y^T = W x^T for few rows of x: 4-bit weights on the tensor cores, block size 64, float32 accumulation.
//
// Compiled once a shape class, with these macros:
//   BF16           1: x, y are bfloat16; 0: float16
//   NT             tiles of 8 rows of x that a block of threads takes
//   MT             tiles of 16 output features that a warp takes
//   WARPS          warps of a block of threads, each with its own features
//   DEPTH          groups of 256 input features whose weights a warp has on their way
//   STAGES         groups of x in shared memory
//   RESIDENT       blocks of threads meant to share a multiprocessor
//
// The weights are the left operand, so that few rows waste little of an instruction (16 features x 8 rows). A lane
// reads what it holds of a 16 x 64 tile, 16 inputs of 2 features, as one 16-byte load.
// A byte of codes becomes a pair of 16-bit numbers by one read of a table in shared memory, of which each bank has a
// copy. A tile lies in one column of quantization blocks: absmax multiplies the tile's float32 sums.

#include "four_bit.cuh"

#define BM (WARPS * MT * 16)
#define ROWS (NT * 8)
#define GROUP 256                // inputs a stage
#define X_STRIDE (GROUP * 2 + 16)  // bytes between rows of x in shared memory: 8 rows' pieces are in different banks
#define X_STAGE (ROWS * X_STRIDE)
#define TABLE_BYTES (256 * 32 * 4)
#define CHAINS (NT * MT > 4 ? 4 / MT : NT)  // tiles of rows whose products a warp makes by turns
static_assert(NT % CHAINS == 0, "no tile is left over");
static_assert(ROWS % WARPS == 0, "warps share the rows of x");

__device__ __forceinline__ float4 load_absmax(const float4* p) {
    float4 v;
    asm volatile("ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

// Four 8 x 8 matrices, of which lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ uint4 read_matrices(u32 at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u16 narrow(float v) {
    u16 r;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
    return r;
}

// Fragments of the four 16 x 16 tiles in 16 bytes of codes: feature g in x, y; feature g + 8 in z, w.
__device__ __forceinline__ void decode(u32 (&a)[4][4], const uint4& codes, const char* table, u32 lane4) {
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const u32 word = words[i / 4];
        const int byte = i % 4;  // entry `byte` starts 128 bytes times the code in
        const u32 shifted = byte == 0 ? word << 7 : word >> (byte * 8 - 7);
        const u32 value = *reinterpret_cast<const u32*>(table + ((shifted & 0x7f80u) | lane4));
        const int of_row = i % 8;
        a[of_row / 2][(i / 8) + 2 * (of_row % 2)] = value;
    }
}

// Grid: (tiles of ROWS rows, tiles of BM features, parts of the inputs).
//   codes     [features / 16, groups, 4 tiles, 32 lanes] of 16 bytes
//   absmax    [features / 16, groups, 16 features] of 4 floats, one a tile
//   pairs     [256], the two numbers of a byte, the first in the low half
//   x, y      [rows, ..], with strides in elements
//   partial   float32, for more than one part: [blocks of outputs, parts, MT * NT, WARPS * 32] of 4
//   arrivals  zeros, one a block of outputs; zeros again afterwards
extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT)
four_bit_rows(const uint4* __restrict__ codes, const float4* __restrict__ absmax, const u32* __restrict__ pairs,
              const u16* __restrict__ x, u16* __restrict__ y, float4* __restrict__ partial, u32* __restrict__ arrivals,
              int rows, int tiles, int groups, long long x_stride, long long y_stride, float scale) {
    extern __shared__ __align__(128) char shared[];
    __shared__ bool is_last;
    const char* table = shared;
    const u32 x_shared = (u32)__cvta_generic_to_shared(shared) + TABLE_BYTES;
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int splits = gridDim.z, split = blockIdx.z;
    const int first = (int)((long long)groups * split / splits), last = (int)((long long)groups * (split + 1) / splits);
    const int row0 = blockIdx.x * ROWS;

    const uint4* my_codes[MT];
    const float4* my_absmax[MT];
    int tile[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        tile[m] = (blockIdx.y * WARPS + warp) * MT + m;
        const int at = tile[m] < tiles ? tile[m] : tiles - 1;  // beyond the last feature: read, but never written
        my_codes[m] = codes + (long long)at * groups * 128 + lane;
        my_absmax[m] = absmax + (long long)at * groups * 16 + g;
    }
    uint4 ahead[DEPTH][MT][4];
    float4 scales[DEPTH][MT][2];
    auto fetch = [&](int slot, int group) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int k = 0; k < 4; k++) ahead[slot][m][k] = load_codes(my_codes[m] + group * 128 + k * 32);
#pragma unroll
            for (int h = 0; h < 2; h++) scales[slot][m][h] = load_absmax(my_absmax[m] + group * 16 + h * 8);
        }
    };
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++)
        if (first + slot < last) fetch(slot, first + slot);

    for (u32 entry = thread; entry < 256; entry += WARPS * 32) {
        const u32 pair = pairs[entry];
        const uint4 four = {pair, pair, pair, pair};
#pragma unroll
        for (int i = 0; i < 8; i++) reinterpret_cast<uint4*>(shared)[entry * 8 + (i + lane) % 8] = four;
    }
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // only weights were read so far

    // A warp copies whole rows, 16 bytes a lane; rows that are not there become zeros.
    const u16* my_x = x + (long long)(row0 + warp) * x_stride + lane * 8;
    const u32 to_x = x_shared + warp * X_STRIDE + lane * 16;
    auto fetch_x = [&](int group, int stage) {
#pragma unroll
        for (int i = 0; i < ROWS / WARPS; i++) {
            const bool valid = row0 + (int)warp + i * WARPS < rows;
            const u16* from = valid ? my_x + (long long)i * WARPS * x_stride + group * GROUP : x;
            copy_async(to_x + stage * X_STAGE + i * WARPS * X_STRIDE, from, valid);
        }
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (first + stage < last) fetch_x(first + stage, stage);
        asm volatile("cp.async.commit_group;");
    }

    float acc[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;

    int stage = 0;
    for (int base = first; base < last; base += DEPTH) {
#pragma unroll
        for (int slot = 0; slot < DEPTH; slot++) {
            const int group = base + slot;
            if (group >= last) break;
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            __syncthreads();  // this group of x is there for all, and the stage before it was read by all
            const int free = stage == 0 ? STAGES - 1 : stage - 1;
            if (group + STAGES - 1 < last) fetch_x(group + STAGES - 1, free);
            asm volatile("cp.async.commit_group;");
            const u32 my_rows = x_shared + stage * X_STAGE + lane % 8 * X_STRIDE + lane / 8 * 16;
            stage = stage == STAGES - 1 ? 0 : stage + 1;
            const bool more = group + DEPTH < last;
            float4 by[MT][2];
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    by[m][h] = scales[slot][m][h];
                    if (more) scales[slot][m][h] = load_absmax(my_absmax[m] + (group + DEPTH) * 16 + h * 8);
                }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u32 a[MT][4][4];
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    decode(a[m], ahead[slot][m][k], table, lane * 4);
                    if (more) ahead[slot][m][k] = load_codes(my_codes[m] + (group + DEPTH) * 128 + k * 32);
                }
#pragma unroll
                for (int n0 = 0; n0 < NT; n0 += CHAINS) {
                    float c[CHAINS][MT][4];
                    u32 b[CHAINS][8];
#pragma unroll
                    for (int n = 0; n < CHAINS; n++) {
                        const u32 at = my_rows + (n0 + n) * 8 * X_STRIDE + k * 128;
                        const uint4 b0 = read_matrices(at), b1 = read_matrices(at + 64);
                        b[n][0] = b0.x, b[n][1] = b0.y, b[n][2] = b0.z, b[n][3] = b0.w;
                        b[n][4] = b1.x, b[n][5] = b1.y, b[n][6] = b1.z, b[n][7] = b1.w;
#pragma unroll
                        for (int m = 0; m < MT; m++) c[n][m][0] = c[n][m][1] = c[n][m][2] = c[n][m][3] = 0.0f;
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++)  // neighbours do not wait for each other
#pragma unroll
                        for (int n = 0; n < CHAINS; n++)
#pragma unroll
                            for (int m = 0; m < MT; m++) mma(c[n][m], a[m][i], b[n][2 * i], b[n][2 * i + 1]);
#pragma unroll
                    for (int n = 0; n < CHAINS; n++)
#pragma unroll
                        for (int m = 0; m < MT; m++) {
                            const float4 l = by[m][0], h = by[m][1];
                            const float low = k == 0 ? l.x : k == 1 ? l.y : k == 2 ? l.z : l.w;
                            const float high = k == 0 ? h.x : k == 1 ? h.y : k == 2 ? h.z : h.w;
                            float(&sum)[4] = acc[m][n0 + n];
                            sum[0] = fmaf(low, c[n][m][0], sum[0]);
                            sum[1] = fmaf(low, c[n][m][1], sum[1]);
                            sum[2] = fmaf(high, c[n][m][2], sum[2]);
                            sum[3] = fmaf(high, c[n][m][3], sum[3]);
                        }
                }
            }
        }
    }

    if (splits > 1) {  // every part writes its sums; the last to come adds them up, always in the same order
        const int block = blockIdx.y * gridDim.x + blockIdx.x, parts = MT * NT * WARPS * 32;
        float4* mine = partial + ((long long)block * splits + split) * parts + thread;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                if (row0 + n * 8 < rows)
                    __stcg(mine + (m * NT + n) * (WARPS * 32),
                           make_float4(acc[m][n][0], acc[m][n][1], acc[m][n][2], acc[m][n][3]));
        __syncthreads();
        if (thread == 0) {  // releases what this block wrote, acquires what the others did
            u32 before;
            asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals + block) : "memory");
            is_last = before == splits - 1;
            if (is_last) arrivals[block] = 0;
        }
        __syncthreads();
        if (!is_last) return;
        const float4* all = partial + (long long)block * splits * parts + thread;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (row0 + n * 8 >= rows) continue;
                float4 sum = __ldcg(all + (m * NT + n) * (WARPS * 32));
#pragma unroll 4
                for (int s = 1; s < splits; s++) {
                    const float4 part = __ldcg(all + (long long)s * parts + (m * NT + n) * (WARPS * 32));
                    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
                }
                acc[m][n][0] = sum.x, acc[m][n][1] = sum.y, acc[m][n][2] = sum.z, acc[m][n][3] = sum.w;
            }
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        if (tile[m] >= tiles) continue;
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = row0 + n * 8 + t * 2 + i % 2;
                if (row < rows) y[row * y_stride + tile[m] * 16 + g + (i / 2) * 8] = narrow(acc[m][n][i] * scale);
            }
        }
    }
}
