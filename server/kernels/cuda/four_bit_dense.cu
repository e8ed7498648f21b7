// A repacked 4-bit weight as a dense one of 16 bits: code times absmax, rounded once.

#include "four_bit.cuh"

#define WARPS 8
#define TABLE_BYTES (256 * 16 * 8)
#define ROW_BYTES (128 + 16)  // of a tile in shared memory: the lanes' parts of 8 rows are in different banks

// Grid: any; a warp takes every so many'th tile of 16 outputs by 64 inputs. codes and absmax as in four_bit_warpgroup.
//   pairs     [256], the two codes of a byte
//   dense     [tiles * 16, columns * 64]
extern "C" __global__ void __launch_bounds__(WARPS * 32)
four_bit_dense(const uint4* __restrict__ codes, const float* __restrict__ absmax, const float2* __restrict__ pairs,
               u16* __restrict__ dense, int tiles, int columns) {
    extern __shared__ __align__(128) char shared[];
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    fill_table(shared, pairs, thread, WARPS * 32);
    __syncthreads();
    char* mine = shared + TABLE_BYTES + warp * (16 * ROW_BYTES);
    const int units = tiles * columns, stride = gridDim.x * WARPS;
    int unit = blockIdx.x * WARPS + warp;
    uint4 next = {0, 0, 0, 0};
    if (unit < units) next = load_codes(codes + (long long)unit * 32 + lane);
    for (; unit < units; unit += stride) {
        const int tile = unit / columns, column = unit % columns;
        const uint4 now = next;
        if (unit + stride < units) next = load_codes(codes + (long long)(unit + stride) * 32 + lane);
        const float* by = absmax + ((long long)tile * (columns / 4) + column / 4) * 64 + g * 4 + column % 4;
        u32 a[4][4];
        decode_exactly(a, now, __ldg(by), __ldg(by + 32), shared, lane % 16 * 8);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                *reinterpret_cast<u32*>(mine + (g + i % 2 * 8) * ROW_BYTES + k * 32 + i / 2 * 16 + t * 4) = a[k][i];
        __syncwarp();
        u16* to = dense + (long long)tile * 16 * columns * 64 + column * 64 + lane % 8 * 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 row = i * 4 + lane / 8;
            *reinterpret_cast<uint4*>(to + (long long)row * columns * 64) =
                *reinterpret_cast<const uint4*>(mine + row * ROW_BYTES + lane % 8 * 16);
        }
        __syncwarp();
    }
}
