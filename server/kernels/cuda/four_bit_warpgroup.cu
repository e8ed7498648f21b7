// y^T = W x^T for some rows of x: 4-bit weights on Hopper's warpgroup matrix instructions, block size 64.
//
// Compiled once a shape class, with these macros:
//   BF16           1: x, y are bfloat16; 0: float16
//   MW             tiles of 64 output features that a warpgroup takes
//   NC             chunks of 64 rows of x that a block of threads takes
//   GROUPS         warpgroups of a block of threads, each with its own features
//   KB             columns of 64 inputs to a stage of x in shared memory: 2 or 4
//   TEMPS          1 or 2: chunks of products that a warpgroup has under way
//   RESIDENT       blocks of threads meant to share a multiprocessor
//   SPLITS         parts of the inputs, each of a block of threads of one cluster: 1, 2, 4 or 8
//   SHARED_OUT     1: all tiles of outputs, one behind the other, are shared out evenly among the blocks of threads,
//                  which may end and begin within a tile (stream-K, Osama et al., arXiv:2301.03598); SPLITS is 1
//
// The weights are the left operand and go from registers to the tensor cores; a byte of codes becomes a pair of 16-bit
// numbers by one read of a table in shared memory, of which each bank has a copy. A tile lies in one column of
// quantization blocks: absmax multiplies the float32 sums of a tile and a chunk. While those of one are made, the
// next tile is decoded and the sums before are added up. The parts meet in shared memory, always in the same order.

#include "four_bit.cuh"
#include "warpgroup.cuh"

#define BM (GROUPS * MW * 64)
#define ROWS (NC * 64)
#define THREADS (GROUPS * 128)
#define STAGES 2
#define COLUMN (ROWS * 128)      // bytes of a column of x
#define TABLE_BYTES (256 * 32 * 4)
#define SUMS_AT (SHARED_OUT ? TABLE_BYTES : 0)  // in shared memory; the table is needed for the next tile
#define SUM_STRIDE (BM * 4 + 16)  // bytes between rows of sums in shared memory: what a warp writes is in all banks
static_assert((KB == 2 || KB == 4) && ROWS % SPLITS == 0, "operands alternate; parts share the rows");
static_assert(!SHARED_OUT || SPLITS == 1, "blocks that share tiles out are no parts of one");

// d [64 features, 64 rows] = a [64, 16] b [16, 64], plus d if `add`
template <int add>
__device__ __forceinline__ void multiply(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                   "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                   "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                   "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add));
}

// Left operands of the four products in 16 bytes of codes: feature g in x, y; feature g + 8 in z, w.
__device__ __forceinline__ void decode(u32 (&a)[4][4], const uint4& codes, const char* table, u32 lane4) {
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const u32 word = words[i / 4];
        const int byte = i % 4;  // entry `byte` starts 128 bytes times the code in
        const u32 shifted = byte == 0 ? word << 7 : word >> (byte * 8 - 7);
        a[i % 8 / 2][(i / 8) + 2 * (i % 2)] = *reinterpret_cast<const u32*>(table + ((shifted & 0x7f80u) | lane4));
    }
}

// Until another block of threads has written its sums.
__device__ __forceinline__ void wait_for(const int* flag) {
    int is_there = 0;
    while (!is_there) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(is_there) : "l"(flag) : "memory");
}

// Grid: (tiles of ROWS rows, tiles of BM features, SPLITS), or where they are shared out any number, all at once.
//   codes     [features / 16, columns, 32 lanes] of 16 bytes; a column is 64 inputs
//   absmax    [features / 16, columns / 4, 16 features, 4]
//   pairs     [256], the two numbers of a byte, the first in the low half
//   x, y      [rows, ..], with strides in elements
//   partial   [blocks of threads, MW * NC * 32, THREADS], where tiles are shared out: sums of those not begun here
//   written   [blocks of threads], zeros, and zeros again at the end: whether those sums are there
extern "C" __global__ void __cluster_dims__(1, 1, SPLITS) __launch_bounds__(THREADS, RESIDENT)
four_bit_warpgroup(const uint4* __restrict__ codes, const float* __restrict__ absmax, const u32* __restrict__ pairs,
                   const u16* __restrict__ x, u16* __restrict__ y, float* partial, int* written, int rows, int tiles,
                   int columns, long long x_stride, long long y_stride, float scale) {
    extern __shared__ __align__(1024) char shared[];  // swizzled atoms start at multiples of their size
    const u32 start = (u32)__cvta_generic_to_shared(shared), x_shared = start + TABLE_BYTES;
    char* table = shared;
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const int split = blockIdx.z, steps = columns / KB;
#if SHARED_OUT
    const int row_tiles = (rows + ROWS - 1) / ROWS, all = (tiles * 16 + BM - 1) / BM * row_tiles * steps;
    auto share = [&](int block) { return (int)((long long)all * block / gridDim.x); };
    bool is_first = true;
    for (int unit = share(blockIdx.x), until = share(blockIdx.x + 1); unit < until;) {
    const int first = unit % steps, count = min(steps - first, until - unit);
    const int row0 = unit / steps % row_tiles * ROWS, feature0 = unit / steps / row_tiles * BM;
#else
    const bool is_first = true;
    const int first = steps * split / SPLITS, count = steps * (split + 1) / SPLITS - first;
    const int row0 = blockIdx.x * ROWS, feature0 = blockIdx.y * BM;
#endif

    const uint4* my_codes[MW];
    const float* my_absmax[MW];
#pragma unroll
    for (int m = 0; m < MW; m++) {
        const int tile = feature0 / 16 + (warp / 4 * MW + m) * 4 + warp % 4;
        const int at = tile < tiles ? tile : tiles - 1;  // beyond the last feature: read, but never written
        my_codes[m] = codes + ((long long)at * columns + first * KB) * 32 + lane;
        my_absmax[m] = absmax + (long long)at * columns * 16 + first * KB / 4 * 64 + first * KB % 4 + g * 4;
    }
    uint4 ahead[KB][MW];  // the next codes of each column of a stage
    float scales[KB][MW][2];
    auto fetch = [&](int k, int m) {
        ahead[k][m] = load_codes(my_codes[m] + k * 32);
        scales[k][m][0] = __ldg(my_absmax[m] + k);
        scales[k][m][1] = __ldg(my_absmax[m] + k + 32);
    };
    auto advance = [&](int step) {  // to where the next step's are; four columns of absmax lie together
#pragma unroll
        for (int m = 0; m < MW; m++) {
            my_codes[m] += KB * 32;
            my_absmax[m] += KB % 4 == 0 || (first + step) * KB % 4 != 0 ? 64 - (4 - KB % 4) % 4 : KB;
        }
    };
#pragma unroll
    for (int k = 0; k < KB; k++)
#pragma unroll
        for (int m = 0; m < MW; m++) fetch(k, m);
    advance(0);

    if (is_first) {
        for (u32 entry = thread; entry < 256; entry += THREADS) {
            const u32 pair = pairs[entry];
            const uint4 four = {pair, pair, pair, pair};
#pragma unroll
            for (int i = 0; i < 8; i++) reinterpret_cast<uint4*>(table)[entry * 8 + (i + lane) % 8] = four;
        }
        asm volatile("griddepcontrol.launch_dependents;");
        asm volatile("griddepcontrol.wait;" ::: "memory");  // only weights were read so far
    }

    // Eight lanes copy the 128 bytes of a row; rows that are not there become zeros.
    const u32 x_row = thread / 8, piece = thread % 8;
    const u16* my_x = x + (long long)(row0 + x_row) * x_stride + first * (KB * 64) + piece * 8;
    const u32 to_x = x_shared + x_row * 128 + ((piece ^ (x_row % 8)) * 16);
    auto fetch_x = [&](int step, int stage) {
#pragma unroll
        for (int i = 0; i < (ROWS * 8 + THREADS - 1) / THREADS; i++) {
            const int row = (int)x_row + i * (THREADS / 8);
            if (ROWS * 8 % THREADS != 0 && row >= ROWS) break;
            const bool valid = row0 + row < rows;
            const u16* from = valid ? my_x + (long long)i * (THREADS / 8) * x_stride + step * (KB * 64) : x;
#pragma unroll
            for (int k = 0; k < KB; k++)
                copy_async(to_x + (stage * KB + k) * COLUMN + i * (THREADS / 8) * 128, valid ? from + k * 64 : x, valid);
        }
    };
    fetch_x(0, 0);
    asm volatile("cp.async.commit_group;");
    __syncthreads();  // the table is there

    float acc[MW][NC][32], sums[TEMPS][32];
#pragma unroll
    for (int i = 0; i < 32; i++) {
#pragma unroll
        for (int m = 0; m < MW; m++)
#pragma unroll
            for (int n = 0; n < NC; n++) acc[m][n][i] = 0.0f;
#pragma unroll
        for (int s = 0; s < TEMPS; s++) sums[s][i] = 0.0f;
    }
    u32 a[2][4][4];
    float by[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};  // of the tile in each half of a
    auto decode_next = [&](int half, int k, int m, bool more) {
        decode(a[half], ahead[k][m], table, lane * 4);
        by[half][0] = scales[k][m][0], by[half][1] = scales[k][m][1];
        if (more) fetch(k, m);
    };
    auto add_up = [&](float (&total)[32], float (&part)[32], float low, float high) {
#pragma unroll
        for (int i = 0; i < 32; i++) asm volatile("" : "+f"(part[i])::"memory");  // not read before the wait
#pragma unroll
        for (int i = 0; i < 32; i++) total[i] = fmaf(i % 4 < 2 ? low : high, part[i], total[i]);
    };
    decode_next(0, 0, 0, count > 1);
    int stage = 0;
    for (int step = 0; step < count; step++) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();  // this stage of x is there for all, and the one before was read by all
        const int next = stage == STAGES - 1 ? 0 : stage + 1;
        if (step + 1 < count) fetch_x(step + 1, next);
        asm volatile("cp.async.commit_group;");
        const bool more = step + 1 < count;
        const u64 my_stage = descriptor(x_shared + stage * KB * COLUMN);  // counts 16 bytes
        stage = next;
#pragma unroll
        for (int tile = 0; tile < KB * MW; tile++) {
            const int k = tile / MW, m = tile % MW, half = tile % 2;
#pragma unroll
            for (int n = 0; n < NC; n++) {
                const int unit = tile * NC + n;
                float(&into)[32] = sums[unit % TEMPS];
                const u64 b = my_stage + (k * COLUMN + n * 8192) / 16;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                multiply<0>(into, a[half][0], b);
                multiply<1>(into, a[half][1], b + 2);
                multiply<1>(into, a[half][2], b + 4);
                multiply<1>(into, a[half][3], b + 6);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (TEMPS == 2 && unit > 0) {  // the sums before these are there
                    const int of = unit - 1;
                    wait_products<1>();
                    add_up(acc[of / NC % MW][of % NC], sums[of % TEMPS], by[of / NC % 2][0], by[of / NC % 2][1]);
                }
                if (n == 0) {  // nothing reads the other half now
                    const int then = (tile + 1) % (KB * MW);
                    if (then != 0) decode_next(1 - half, then / MW, then % MW, more);
                    if (then == 0) advance(step + 1);
                    if (then == 0 && more) decode_next(1 - half, 0, 0, step + 2 < count);
                }
                if (TEMPS == 1 || unit == KB * MW * NC - 1) {
                    wait_products<0>();
                    add_up(acc[m][n], into, by[half][0], by[half][1]);
                }
            }
        }
    }

#if SHARED_OUT
    unit += count;
    is_first = false;
    if (first > 0) {  // whoever began the tile adds these to its own
#pragma unroll
        for (int i = 0; i < MW * NC * 32; i++)
            partial[((long long)blockIdx.x * MW * NC * 32 + i) * THREADS + thread] = acc[i / 32 / NC][i / 32 % NC][i % 32];
        __threadfence();
        __syncthreads();
        if (thread == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(written + blockIdx.x) : "memory");
        continue;
    }
    for (int other = blockIdx.x + 1, end = unit - count + steps; share(other) < end; other++) {
        wait_for(written + other);
#pragma unroll
        for (int i = 0; i < MW * NC * 32; i++)
            acc[i / 32 / NC][i / 32 % NC][i % 32] += partial[((long long)other * MW * NC * 32 + i) * THREADS + thread];
        __syncthreads();
        if (thread == 0) written[other] = 0;
    }
#endif
    // To rows of y through shared memory; each part adds up its share of them.
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MW; m++) {
        const u32 feature = ((warp / 4 * MW + m) * 4 + warp % 4) * 16 + g;
#pragma unroll
        for (int n = 0; n < NC; n++)
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const u32 row = n * 64 + i / 4 * 8 + t * 2 + i % 2, at = feature + i / 2 % 2 * 8;
                *reinterpret_cast<float*>(shared + SUMS_AT + row * SUM_STRIDE + at * 4) = acc[m][n][i];
            }
    }
    meet();
    const int quads = BM / 4;
    for (int i = thread; i < ROWS / SPLITS * quads; i += THREADS) {
        const int row = split * (ROWS / SPLITS) + i / quads, feature = i % quads * 4;
        if (row0 + row >= rows || feature0 + feature >= tiles * 16) continue;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int part = 0; part < SPLITS; part++) {
            const u32 at = start + SUMS_AT + row * SUM_STRIDE + feature * 4;
            const float4 v = SPLITS == 1 ? *reinterpret_cast<const float4*>(shared + SUMS_AT + row * SUM_STRIDE + feature * 4)
                                         : read_part(at, part);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        const uint2 four = {narrow(sum.x * scale, sum.y * scale), narrow(sum.z * scale, sum.w * scale)};
        *reinterpret_cast<uint2*>(y + (row0 + row) * y_stride + feature0 + feature) = four;
    }
    if (SPLITS > 1) meet();  // none leaves while another reads what it has
#if SHARED_OUT
    __syncthreads();  // the sums have been read
    }
#endif
}
