// y^T = W x^T for many rows of x: 4-bit weights on Hopper's warpgroup matrix instructions, block size 64.
//
// Compiled once a shape class, with these macros:
//   BF16           1: x, y are bfloat16; 0: float16
//   MW             tiles of 64 output features that a warpgroup takes
//   NW             tiles of 128 rows of x that a block of threads takes
//   GROUPS         warpgroups of a block of threads, each with its own features
//
// Every weight is made as dequantizing makes it, code times absmax rounded once, so that the result differs from that
// of a product with the dequantized weight by the order of the sums only. It goes from registers to the tensor cores
// as the left operand. A byte of codes becomes two float32 numbers by one read of a table in shared memory, of which
// each pair of banks has a copy. While one column of tiles is multiplied, the next is decoded.

#include "four_bit.cuh"

#define BM (GROUPS * MW * 64)
#define ROWS (NW * 128)
#define THREADS (GROUPS * 128)
#define STAGES 4                 // columns of x in shared memory
#define AHEAD 4                  // columns of codes on their way to registers
#define X_STAGE (ROWS * 128)
#define TABLE_BYTES (256 * 16 * 8)
#define Y_STRIDE (BM * 2 + 16)   // bytes between rows of y in shared memory
static_assert(Y_STRIDE * ROWS <= STAGES * X_STAGE + TABLE_BYTES, "y is staged where x and the table were");

// Rows of 128 bytes, eight of them to an atom of 1024 in which 16-byte pieces are swizzled by the row.
__device__ __forceinline__ u64 descriptor(u32 shared) {
    return (u64)((shared & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// d [64 features, 128 rows] += a [64, 16] b [16, 128]
__device__ __forceinline__ void multiply(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                   "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                   "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                   "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
                   "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),
                   "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),
                   "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
                   "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Grid: (tiles of ROWS rows, tiles of BM features, parts of the inputs).
//   codes     [features / 16, columns, 32 lanes] of 16 bytes; a column is 64 inputs
//   absmax    [features / 16, columns / 4, 16 features, 4]
//   pairs     [256], the two codes of a byte
//   x, y      [rows, ..], with strides in elements
//   partial   float32, for more than one part
//   arrivals  zeros, one a block of outputs; zeros again afterwards
extern "C" __global__ void __launch_bounds__(THREADS, 1)
four_bit_tiles(const uint4* __restrict__ codes, const float* __restrict__ absmax, const float2* __restrict__ pairs,
               const u16* __restrict__ x, u16* __restrict__ y, float4* __restrict__ partial, u32* __restrict__ arrivals,
               int rows, int tiles, int columns, long long x_stride, long long y_stride) {
    extern __shared__ char unaligned[];
    __shared__ bool is_last;
    const u32 start = (u32)__cvta_generic_to_shared(unaligned), pad = (1024 - start % 1024) % 1024;
    char* shared = unaligned + pad;  // swizzled atoms start at multiples of their size
    const u32 x_shared = start + pad;
    char* table = shared + STAGES * X_STAGE;
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int splits = gridDim.z, split = blockIdx.z;
    const int first = (int)((long long)columns * split / splits);
    const int count = (int)((long long)columns * (split + 1) / splits) - first;
    const int row0 = blockIdx.x * ROWS;

    const uint4* my_codes[MW];
    const float* my_absmax[MW];
    int tile[MW];
#pragma unroll
    for (int m = 0; m < MW; m++) {
        tile[m] = blockIdx.y * (BM / 16) + (warp / 4 * MW + m) * 4 + warp % 4;
        const int at = tile[m] < tiles ? tile[m] : tiles - 1;  // beyond the last feature: read, but never written
        my_codes[m] = codes + ((long long)at * columns + first) * 32 + lane;
        my_absmax[m] = absmax + (long long)at * columns * 16 + g * 4;
    }
    uint4 ahead[AHEAD][MW];
    float scales[AHEAD][MW][2];
    auto fetch = [&](int slot, int step) {
#pragma unroll
        for (int m = 0; m < MW; m++) {
            ahead[slot][m] = load_codes(my_codes[m] + (long long)step * 32);
            const int column = first + step;
            const float* from = my_absmax[m] + column / 4 * 64 + column % 4;
            scales[slot][m][0] = __ldg(from);
            scales[slot][m][1] = __ldg(from + 32);
        }
    };
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++)
        if (slot < count) fetch(slot, slot);

    fill_table(table, pairs, thread, THREADS);
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // only weights were read so far

    // Eight lanes copy the 128 bytes of a row; rows that are not there become zeros.
    const u32 x_row = thread / 8, piece = thread % 8;
    const u16* my_x = x + (long long)(row0 + x_row) * x_stride + first * 64 + piece * 8;
    const u32 to_x = x_shared + x_row * 128 + ((piece ^ (x_row % 8)) * 16);
    auto fetch_x = [&](int step, int stage) {
#pragma unroll
        for (int i = 0; i < ROWS * 8 / THREADS; i++) {
            const bool valid = row0 + (int)x_row + i * (THREADS / 8) < rows;
            const u16* from = valid ? my_x + (long long)i * (THREADS / 8) * x_stride + step * 64 : x;
            copy_async(to_x + stage * X_STAGE + i * (THREADS / 8) * 128, from, valid);
        }
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < count) fetch_x(stage, stage);
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    float acc[MW][NW][64];
#pragma unroll
    for (int m = 0; m < MW; m++)
#pragma unroll
        for (int n = 0; n < NW; n++)
#pragma unroll
            for (int i = 0; i < 64; i++) acc[m][n][i] = 0.0f;

    u32 a[2][MW][4][4];
    auto decode_step = [&](int slot, int step) {
#pragma unroll
        for (int m = 0; m < MW; m++)
            decode_exactly(a[slot % 2][m], ahead[slot][m], scales[slot][m][0], scales[slot][m][1], table, lane % 16 * 8);
        if (step + AHEAD < count) fetch(slot, step + AHEAD);
    };
    decode_step(0, 0);
    for (int base = 0; base < count; base += STAGES) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            const int step = base + stage;
            if (step >= count) break;
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int n = 0; n < NW; n++) {
                    const u64 b = descriptor(x_shared + stage * X_STAGE + n * 128 * 128 + k * 32);
#pragma unroll
                    for (int m = 0; m < MW; m++) multiply(acc[m][n], a[stage % 2][m][k], b);
                }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the step before this one is done
            if (step + 1 < count) decode_step((stage + 1) % STAGES, step + 1);
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 3) : "memory");
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncthreads();  // the next column of x is there for all, and the one before this was read by all
            if (step + STAGES - 1 < count) fetch_x(step + STAGES - 1, (stage + STAGES - 1) % STAGES);
            asm volatile("cp.async.commit_group;");
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int m = 0; m < MW; m++)
#pragma unroll
        for (int n = 0; n < NW; n++)
#pragma unroll
            for (int i = 0; i < 64; i++) asm volatile("" : "+f"(acc[m][n][i])::"memory");

    if (splits > 1) {  // every part writes its sums; the last to come adds them up, always in the same order
        const int block = blockIdx.y * gridDim.x + blockIdx.x, parts = MW * NW * 16 * THREADS;
        float4* mine = partial + ((long long)block * splits + split) * parts + thread;
#pragma unroll
        for (int m = 0; m < MW; m++)
#pragma unroll
            for (int n = 0; n < NW; n++)
#pragma unroll
                for (int i = 0; i < 16; i++)
                    if (row0 + n * 128 + i * 8 < rows)
                        __stcg(mine + ((m * NW + n) * 16 + i) * THREADS,
                               make_float4(acc[m][n][4 * i], acc[m][n][4 * i + 1], acc[m][n][4 * i + 2],
                                           acc[m][n][4 * i + 3]));
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
        for (int m = 0; m < MW; m++)
#pragma unroll
            for (int n = 0; n < NW; n++)
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    if (row0 + n * 128 + i * 8 >= rows) continue;
                    const float4* from = all + ((m * NW + n) * 16 + i) * THREADS;
                    float4 sum = __ldcg(from);
                    for (int s = 1; s < splits; s++) {
                        const float4 part = __ldcg(from + (long long)s * parts);
                        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
                    }
                    acc[m][n][4 * i] = sum.x, acc[m][n][4 * i + 1] = sum.y;
                    acc[m][n][4 * i + 2] = sum.z, acc[m][n][4 * i + 3] = sum.w;
                }
    }

    // To rows of y through shared memory: what the lanes hold is 8 features of a row at a time.
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MW; m++) {
        const u32 feature = ((warp / 4 * MW + m) * 4 + warp % 4) * 16 + g;
#pragma unroll
        for (int n = 0; n < NW; n++)
#pragma unroll
            for (int i = 0; i < 64; i += 2) {
                const u32 both = narrow(acc[m][n][i], acc[m][n][i + 1]);
                const u32 row = n * 128 + i / 4 * 8 + t * 2, at = feature + i / 2 % 2 * 8;
                *reinterpret_cast<u16*>(shared + row * Y_STRIDE + at * 2) = (u16)both;
                *reinterpret_cast<u16*>(shared + (row + 1) * Y_STRIDE + at * 2) = (u16)(both >> 16);
            }
    }
    __syncthreads();
    const int pieces = BM / 8, feature0 = blockIdx.y * BM;
    for (int i = thread; i < ROWS * pieces; i += THREADS) {
        const int row = i / pieces, feature = i % pieces * 8;
        if (row0 + row < rows && feature0 + feature < tiles * 16)
            *reinterpret_cast<uint4*>(y + (row0 + row) * y_stride + feature0 + feature) =
                *reinterpret_cast<const uint4*>(shared + row * Y_STRIDE + feature * 2);
    }
}
