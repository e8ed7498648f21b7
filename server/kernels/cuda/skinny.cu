// y = x W^T for a few dozen rows of x and a 16-bit W, on Hopper's warpgroup matrix instructions: as fast as W is read.
//
// Compiled once a plan, with these macros:
//   BF16           1: x, y, W are bfloat16; 0: float16
//   MW             tiles of 64 output features that a warpgroup takes
//   GROUPS         warpgroups of a block of threads, each with its own features
//   KB             columns of 64 inputs to a stage
//   STAGES         stages of W and x in shared memory
//   SPLITS         parts of the inputs, each of a block of threads of one cluster: 1, 2, 4 or 8
//
// W goes to shared memory by bulk tensor copies, of which a block has STAGES - 1 stages on their way, the first of them
// before what precedes the kernel has ended. W is the left operand, so that few rows waste nothing. The parts meet in
// shared memory, always in the same order.

#include "warpgroup.cuh"

#define BM (GROUPS * MW * 64)
#define ROWS 64  // of x, that a block of threads takes
#define THREADS (GROUPS * 128)
#define W_COLUMN (BM * 128)      // bytes of a column of W
#define X_COLUMN (ROWS * 128)    // and of x
#define STAGE (KB * (W_COLUMN + X_COLUMN))
#define SUM_STRIDE (BM * 4 + 16)  // bytes between rows of sums in shared memory: what a warp writes is in all banks
#define SUMS (ROWS / 2)           // float32 that a thread has of a tile
#define OPERANDS (STAGES * STAGE)
static_assert(BM <= 256 && ROWS % SPLITS == 0, "a bulk copy takes 256 features at most; parts share the rows");
static_assert(ROWS * SUM_STRIDE <= OPERANDS, "sums take the room of operands");

// d [64 features, ROWS] = a [64, 16] b [16, ROWS], plus d if `add`
__device__ __forceinline__ void multiply(float (&d)[SUMS], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0; }"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                   "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                   "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                   "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b), "r"(add));
}

// Grid: (tiles of BM features, tiles of ROWS rows, SPLITS).
//   map       of W [features, inputs], boxes of [BM, 64], 128-byte swizzle
//   x, y      [rows, ..], with strides in elements
//   columns   inputs / 64
extern "C" __global__ void __cluster_dims__(1, 1, SPLITS) __launch_bounds__(THREADS)
skinny(const __grid_constant__ TensorMap map, const u16* __restrict__ x, u16* __restrict__ y, int rows, int features, int columns,
     long long x_stride, long long y_stride) {
    extern __shared__ __align__(1024) char shared[];  // swizzled atoms start at multiples of their size
    const u32 start = (u32)__cvta_generic_to_shared(shared), full = start + OPERANDS;  // a barrier a stage
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int split = blockIdx.z, steps = columns / KB;
    const int first = steps * split / SPLITS, count = steps * (split + 1) / SPLITS - first;
    const int row0 = blockIdx.y * ROWS, feature0 = blockIdx.x * BM;

    auto fetch_w = [&](int step, int stage) {  // by one thread
        const u32 barrier = full + stage * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(KB * W_COLUMN) : "memory");
#pragma unroll
        for (int k = 0; k < KB; k++)
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                         ::"r"(start + stage * STAGE + k * W_COLUMN), "l"(&map),
                           "r"(((first + step) * KB + k) * 64), "r"(feature0), "r"(barrier) : "memory");
    };
    if (thread == 0) {
        for (int stage = 0; stage < STAGES; stage++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + stage * 8) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int step = 0; step < STAGES - 1 && step < count; step++) fetch_w(step, step);
    }
    __syncthreads();  // the barriers are there
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");  // only W was read so far

    // Eight lanes copy the 128 bytes of a row; rows that are not there become zeros.
    const u32 x_row = thread / 8, piece = thread % 8;
    const u16* my_x = x + (long long)(row0 + x_row) * x_stride + first * (KB * 64) + piece * 8;
    const u32 to_x = start + KB * W_COLUMN + x_row * 128 + ((piece ^ (x_row % 8)) * 16);
    auto fetch_x = [&](int step, int stage) {
#pragma unroll
        for (int i = 0; i < (ROWS * 8 + THREADS - 1) / THREADS; i++) {
            const int row = (int)x_row + i * (THREADS / 8);
            if (ROWS * 8 % THREADS != 0 && row >= ROWS) break;
            const bool valid = row0 + row < rows;
            const u16* from = my_x + (long long)i * (THREADS / 8) * x_stride + step * (KB * 64);
#pragma unroll
            for (int k = 0; k < KB; k++)
                copy_async(to_x + stage * STAGE + k * X_COLUMN + i * (THREADS / 8) * 128, valid ? from + k * 64 : x, valid);
        }
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < count) fetch_x(step, step);
        asm volatile("cp.async.commit_group;");
    }

    float acc[MW][SUMS];  // the first product sets them
    int stage = 0;
    u32 phase = 0;
    for (int step = 0; step < count; step++) {
        wait_phase(full + stage * 8, phase);
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        wait_products<0>();
        __syncthreads();  // this stage is there for all, and the one before was read by all
        const int freed = stage == 0 ? STAGES - 1 : stage - 1;
        if (step + STAGES - 1 < count) {
            if (thread == 0) fetch_w(step + STAGES - 1, freed);
            fetch_x(step + STAGES - 1, freed);
        }
        asm volatile("cp.async.commit_group;");
        const u64 a = descriptor(start + stage * STAGE + warp / 4 * MW * 8192);  // counts 16 bytes
        const u64 b = descriptor(start + stage * STAGE + KB * W_COLUMN);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < KB; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int m = 0; m < MW; m++)
                    multiply(acc[m], a + (k * W_COLUMN + m * 8192) / 16 + 2 * i, b + k * X_COLUMN / 16 + 2 * i,
                             k + i > 0 || step > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    wait_products<0>();
#pragma unroll
    for (int m = 0; m < MW; m++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(acc[m][i])::"memory");  // not read before the wait

    // To rows of y through shared memory; each part adds up its share of them.
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MW; m++) {
        const u32 feature = ((warp / 4 * MW + m) * 4 + warp % 4) * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const u32 row = i / 4 * 8 + lane % 4 * 2 + i % 2, at = feature + i / 2 % 2 * 8;
            *reinterpret_cast<float*>(shared + row * SUM_STRIDE + at * 4) = acc[m][i];
        }
    }
    meet();
    const int quads = BM / 4;
    for (int i = thread; i < ROWS / SPLITS * quads; i += THREADS) {
        const int row = split * (ROWS / SPLITS) + i / quads, feature = i % quads * 4;
        if (row0 + row >= rows || feature0 + feature >= features) continue;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int part = 0; part < SPLITS; part++) {
            const float4 v = SPLITS == 1 ? *reinterpret_cast<const float4*>(shared + row * SUM_STRIDE + feature * 4)
                                         : read_part(start + row * SUM_STRIDE + feature * 4, part);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        const uint2 four = {narrow(sum.x, sum.y), narrow(sum.z, sum.w)};
        *reinterpret_cast<uint2*>(y + (row0 + row) * y_stride + feature0 + feature) = four;
    }
    if (SPLITS > 1) meet();  // none leaves while another reads what it has
}
