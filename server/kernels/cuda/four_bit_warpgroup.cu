// y^T = W x^T for some rows of x: 4-bit weights on Hopper's warpgroup matrix instructions, block size 64.
//
// Compiled once a plan, with these macros:
//   BF16           1: x, y are bfloat16; 0: float16
//   CHUNK          rows of x that a product takes: 64 or 128
//   NC             chunks of rows that a block of threads takes
//   GROUPS         warpgroups of a block of threads, each with 64 output features of its own
//   KB             columns of 64 inputs to a step: 2 or 4
//   STAGES         columns of x in shared memory
//   RESIDENT       blocks of threads meant to share a multiprocessor
//   SPLITS         parts of the inputs, each of a block of threads of one cluster: 1, 2, 4 or 8
//   SHARED_OUT     1: all tiles of outputs, one behind the other, are shared out evenly among the blocks of threads,
//                  which may end and begin within a tile (stream-K, Osama et al., arXiv:2301.03598); SPLITS is 1
//
// The weights are the left operand and go from registers to the tensor cores; a byte of codes becomes a pair of 16-bit
// numbers by one read of a table in shared memory, of which each bank has a copy. A tile lies in one column of
// quantization blocks: absmax multiplies the float32 sums of a tile and a chunk. While those are made, some of the next
// tile is decoded. The parts meet in shared memory, always in the same order.
//
// x comes by bulk tensor copies, STAGES columns ahead. Codes and absmax come to shared memory two steps ahead, each
// thread's own: loads into registers would share one counter, and waiting for any would be waiting for the last.

#include "four_bit.cuh"
#include "products.cuh"

#define BM (GROUPS * 64)
#define ROWS (NC * CHUNK)
#define SUM (CHUNK / 2)  // float32 of a thread
#define THREADS (GROUPS * 128)
#define COLUMN (ROWS * 128)      // bytes of a column of x
#define TABLE_BYTES (256 * 32 * 4)
#define CODES (TABLE_BYTES + STAGES * COLUMN)  // where codes and absmax of two steps are, each thread's for itself
#define STEP_CODES (KB * THREADS * 16)
#define STEP_SCALES (2 * THREADS * KB * 4)
#define SUM_STRIDE (BM * 4 + 16)  // bytes between rows of sums in shared memory: what a warp writes is in all banks
#define SUMS (SPLITS > 1 ? ROWS * SUM_STRIDE : 0)  // take the room of operands
#define OPERANDS (CODES + 2 * (STEP_CODES + STEP_SCALES))
#define BARRIERS (OPERANDS > SUMS ? OPERANDS : SUMS)  // for each stage, one that it is there and one that it was read
static_assert((KB == 2 || KB == 4) && ROWS % SPLITS == 0, "operands alternate; parts share the rows");
static_assert(!SHARED_OUT || SPLITS == 1, "blocks that share tiles out are no parts of one");

// Left operands of the four products in 16 bytes of codes, of which those of bytes first to last - 1: feature g in x, y;
// feature g + 8 in z, w.
__device__ __forceinline__ void decode(u32 (&a)[4][4], const uint4& codes, int first, int last, const char* table,
                                       u32 lane4) {
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        if (i < first || i >= last) continue;
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

// Of a matrix of 8 by 8 16-bit numbers of which lane 4 g + t has 2 t and 2 t + 1 of row g.
__device__ __forceinline__ u32 transpose(u32 of) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(of));
    return r;
}

// Grid: (tiles of ROWS rows, tiles of BM features, SPLITS), or where they are shared out any number, all at once.
//   map       of x [rows, inputs], boxes of [ROWS, 64], 128-byte swizzle
//   codes     [features / 16, columns, 32 lanes] of 16 bytes; a column is 64 inputs
//   absmax    [features / 16, columns / 4, 16 features, 4]
//   pairs     [256], the two numbers of a byte, the first in the low half
//   y         [rows, features]
//   partial   [blocks of threads, NC * SUM / 4, THREADS], where tiles are shared out: sums of those not begun here
//   written   [blocks of threads], zeros, and zeros again at the end: whether those sums are there
extern "C" __global__ void __cluster_dims__(1, 1, SPLITS) __launch_bounds__(THREADS, RESIDENT)
four_bit_warpgroup(const __grid_constant__ TensorMap map, const uint4* __restrict__ codes, const float* __restrict__ absmax,
                   const u32* __restrict__ pairs, u16* __restrict__ y, float4* partial, int* written, int rows, int tiles,
                   int columns, float scale) {
    extern __shared__ __align__(1024) char shared[];  // swizzled atoms start at multiples of their size
    const u32 start = (u32)__cvta_generic_to_shared(shared), x_shared = start + TABLE_BYTES, full = start + BARRIERS,
              empty = full + STAGES * 8;
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    const bool is_first_warp = __shfl_sync(0xffffffffu, warp, 0) == 0;
    const int steps = columns / KB;
    // A unit is a step of a tile of outputs.
#if SHARED_OUT
    const int row_tiles = (rows + ROWS - 1) / ROWS;
    const u32 all = (tiles * 16 + BM - 1) / BM * row_tiles * steps;
    auto share = [&](u32 block) { return (int)(all * block / gridDim.x); };
    const int begin = share(blockIdx.x), until = share(blockIdx.x + 1);
#else
    const int split = blockIdx.z, begin = steps * split / SPLITS, until = steps * (split + 1) / SPLITS;
#endif

    if (is_first_warp && elected()) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + stage * 8) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + stage * 8), "n"(GROUPS * 4) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    const uint4* my_codes = codes;
    const float* my_absmax = absmax;
    const u32 to_codes = start + CODES + thread * 16, to_scales = start + CODES + 2 * STEP_CODES + thread * (KB * 4);
    auto fetch_step = [&](int step, bool valid) {  // codes and absmax of a step, the next call those of the next one
        if (valid) {
#pragma unroll
            for (int k = 0; k < KB; k++)
                asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;"
                             ::"r"(to_codes + step % 2 * STEP_CODES + k * (THREADS * 16)), "l"(my_codes + k * 32) : "memory");
#pragma unroll
            for (int i = 0; i < 2; i++)
                asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                             ::"r"(to_scales + step % 2 * STEP_SCALES + i * (THREADS * KB * 4)), "l"(my_absmax + i * 32),
                               "n"(KB * 4) : "memory");
            my_codes += KB * 32;
            my_absmax += KB == 4 || step % 2 ? 64 - (4 - KB) : KB;  // four columns of absmax lie together
        }
        asm volatile("cp.async.commit_group;");
    };
    auto fetch_first = [&](int feature0, int step, bool more) {
        const int tile = feature0 / 16 + warp;
        const int at = tile < tiles ? tile : tiles - 1;  // beyond the last feature: read, but never written
        my_codes = codes + ((long long)at * columns + step * KB) * 32 + lane;
        my_absmax = absmax + (long long)at * columns * 16 + step * KB / 4 * 64 + step * KB % 4 + g * 4;
        fetch_step(step, true);
        fetch_step(step + 1, more);
    };
#if SHARED_OUT
    fetch_first(begin / steps / row_tiles * BM, begin % steps, begin % steps + 1 < steps && begin + 1 < until);
#else
    fetch_first(blockIdx.y * BM, begin, begin + 1 < until);
#endif
    u32 pair[(256 + THREADS - 1) / THREADS];
#pragma unroll
    for (int i = 0; i < (256 + THREADS - 1) / THREADS; i++) pair[i] = __ldg(pairs + (i * THREADS + thread) % 256);

    auto fetch_x = [&](int column, int row, u32 stage) {  // by one thread; past the tile's columns are the next one's
        for (; SHARED_OUT && column >= columns; column -= columns) row = row + ROWS < rows ? row + ROWS : 0;
        const u32 barrier = full + stage * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(COLUMN) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                     ::"r"(x_shared + stage * COLUMN), "l"(&map), "r"(column * 64), "r"(row), "r"(barrier) : "memory");
    };
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // only weights were read so far
#if SHARED_OUT
    const int row_begin = begin / steps % row_tiles * ROWS, step_begin = begin % steps;
#else
    const int row_begin = blockIdx.x * ROWS, step_begin = begin;
#endif
    if (is_first_warp && elected())
        for (int i = 0; i < STAGES && i < (until - begin) * KB; i++) fetch_x(step_begin * KB + i, row_begin, i);
#pragma unroll
    for (int i = 0; i < (256 + THREADS - 1) / THREADS; i++) {
        const u32 entry = i * THREADS + thread;
        const uint4 four = {pair[i], pair[i], pair[i], pair[i]};
        if (256 % THREADS == 0 || entry < 256)
#pragma unroll
            for (int j = 0; j < 8; j++) reinterpret_cast<uint4*>(shared)[entry * 8 + (j + lane) % 8] = four;
    }
    __syncthreads();  // the table and the barriers are there

    u32 lane4 = lane * 4, my_codes_at = CODES + thread * 16;
    asm volatile("" : "+r"(lane4), "+r"(my_codes_at));  // kept, not made again each time
    u32 stage = 0, phase = 0;
    auto release = [&](u32 of) {  // this warp has read a stage
        if (elected()) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + of * 8) : "memory");
    };
    float acc[NC][SUM], sums[SUM];
    u32 a[2][4][4];
    float by[2][2];  // of the tile in each half of a
    auto decode_part = [&](int part, int parts, int k, int step) {  // of the tile in a column of a step
        const char* from = shared + my_codes_at + step % 2 * STEP_CODES + k * (THREADS * 16);
        decode(a[k % 2], *reinterpret_cast<const uint4*>(from), 16 * part / parts, 16 * (part + 1) / parts, shared, lane4);
        if (part == parts - 1)
#pragma unroll
            for (int i = 0; i < 2; i++)
                by[k % 2][i] = *reinterpret_cast<const float*>(shared + CODES + 2 * STEP_CODES + step % 2 * STEP_SCALES +
                                                               (i * THREADS + thread) * (KB * 4) + k * 4);
    };
#if SHARED_OUT
    for (int unit = begin; unit < until;) {
    const int first = unit % steps, count = min(steps - first, until - unit);
    const int row0 = unit / steps % row_tiles * ROWS, feature0 = unit / steps / row_tiles * BM;
#else
    int unit = begin;
    const int first = begin, count = until - begin, row0 = blockIdx.x * ROWS, feature0 = blockIdx.y * BM;
#endif
#pragma unroll
    for (int i = 0; i < NC * SUM; i++) acc[i / SUM][i % SUM] = 0.0f;
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    decode_part(0, 1, 0, first);
    for (int step = first; step < first + count; step++, unit++) {
#pragma unroll
        for (int k = 0; k < KB; k++) {
            const u32 before = stage == 0 ? STAGES - 1 : stage - 1;
            wait_phase(full + stage * 8, phase);
#pragma unroll
            for (int n = 0; n < NC; n++) {
                const u64 b = descriptor(x_shared + stage * COLUMN) + n * CHUNK * 128 / 16;  // counts 16 bytes
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                multiply<0>(sums, a[k % 2][0], b);
                multiply<1>(sums, a[k % 2][1], b + 2);
                multiply<1>(sums, a[k % 2][2], b + 4);
                multiply<1>(sums, a[k % 2][3], b + 6);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                // Nothing reads the other half now; what is decoded past the last step is not used.
                if (k == KB - 1 && n == 0) {
                    fetch_step(step + 2, step + 2 < first + count);
                    asm volatile("cp.async.wait_group 1;" ::: "memory");
                }
                decode_part(n, NC, (k + 1) % KB, k == KB - 1 ? step + 1 : step);
                wait_products<0>();
                if (n == NC - 1) release(stage);
#pragma unroll
                for (int i = 0; i < SUM; i++) asm volatile("" : "+f"(sums[i])::"memory");  // not read before the wait
#pragma unroll
                for (int i = 0; i < SUM; i++) acc[n][i] = fmaf(by[k % 2][i % 4 / 2], sums[i], acc[n][i]);
            }
            if (is_first_warp && (unit > begin || k > 0) && (until - unit) * KB - k > STAGES - 1) {
                wait_phase(empty + before * 8, stage == 0 ? phase ^ 1 : phase);
                if (elected()) fetch_x(step * KB + k + STAGES - 1, row0, before);
            }
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }

#if SHARED_OUT
    if (unit < until) fetch_first(unit / steps / row_tiles * BM, 0, steps > 1 && unit + 1 < until);
    if (first > 0) {  // whoever began the tile adds these to its own
#pragma unroll
        for (int i = 0; i < NC * SUM; i += 4) {
            const float* of = acc[i / SUM] + i % SUM;
            partial[(blockIdx.x * (NC * SUM / 4) + i / 4) * THREADS + thread] = {of[0], of[1], of[2], of[3]};
        }
        __threadfence();
        __syncthreads();
        if (thread == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(written + blockIdx.x) : "memory");
        continue;
    }
    for (u32 other = blockIdx.x + 1; share(other) < unit - count + steps; other++) {
        wait_for(written + other);
#pragma unroll
        for (int i = 0; i < NC * SUM; i += 4) {
            float* to = acc[i / SUM] + i % SUM;
            const float4 of = partial[(other * (NC * SUM / 4) + i / 4) * THREADS + thread];
            to[0] += of.x, to[1] += of.y, to[2] += of.z, to[3] += of.w;
        }
        __syncthreads();
        if (thread == 0) written[other] = 0;
    }
#endif
    const long long y_stride = tiles * 16;
#if SPLITS == 1
    // A lane has two rows of two features; eight by eight of them change places, and then lanes that are neighbours
    // give each other half of what they have: four features of a row.
    const int tile = feature0 / 16 + warp;
    u16* to = y + (long long)(row0 + g) * y_stride + tile * 16 + (t % 2 * 8 + t / 2 * 4);
#pragma unroll
    for (int i = 0; i < NC * SUM; i += 4) {
        const float* sum = acc[i / SUM] + i % SUM;
        const u32 low = transpose(narrow(sum[0] * scale, sum[1] * scale));
        const u32 high = transpose(narrow(sum[2] * scale, sum[3] * scale));
        const u32 other = __shfl_xor_sync(0xffffffffu, t % 2 ? low : high, 1);
        const uint2 four = {t % 2 ? other : low, t % 2 ? high : other};
        if (tile < tiles && row0 + i * 2 + (int)g < rows) *reinterpret_cast<uint2*>(to + i * 2 * y_stride) = four;
    }
#else
    // To rows of y through shared memory; each part adds up its share of them.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < NC * SUM; i++) {
        const u32 row = i / 4 * 8 + t * 2 + i % 2, feature = warp * 16 + g + i / 2 % 2 * 8;
        *reinterpret_cast<float*>(shared + row * SUM_STRIDE + feature * 4) = acc[i / SUM][i % SUM];
    }
    meet();
    const int quads = BM / 4;
    for (int i = thread; i < ROWS / SPLITS * quads; i += THREADS) {
        const int row = split * (ROWS / SPLITS) + i / quads, feature = i % quads * 4;
        if (row0 + row >= rows || feature0 + feature >= tiles * 16) continue;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int part = 0; part < SPLITS; part++) {
            const float4 v = read_part(start + row * SUM_STRIDE + feature * 4, part);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        const uint2 four = {narrow(sum.x * scale, sum.y * scale), narrow(sum.z * scale, sum.w * scale)};
        *reinterpret_cast<uint2*>(y + (row0 + row) * y_stride + feature0 + feature) = four;
    }
#endif
#if SHARED_OUT
    }
#endif
    if (SPLITS > 1) meet();  // none leaves while another reads what it has
}
