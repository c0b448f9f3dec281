// How long the rows of a dispatch take when nothing has to be found out: no layout, no exchange, no labels, no signals, no
// quantizing. What a dispatch of ranks that share one GPU's memory takes longer than this, it takes for those.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -o scatter scatter.cu && ./scatter
//
// 4 ranks with 24 and 33 blocks each, one a multiprocessor, and 8 with 16: 4096 tokens of 14,336 bytes, each to the ranks of 8 random
// experts of 256. A warp loads a piece of a row by a bulk copy, stores it to where the row goes, and takes its next pieces by its
// rank's counter, two if a row has more than one, as the library's kernels do with rows that they do not quantize; "half written"
// stores half of what was loaded, as FP8 does of BF16. Prints the medians of 9 runs in microseconds, and their ratio to
// (bytes read + bytes written) / the bandwidth of the driver's copy.
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define CHECK(call)                                                                        \
  do {                                                                                     \
    cudaError_t code = (call);                                                             \
    if (code != cudaSuccess) {                                                             \
      fprintf(stderr, "scatter: %s: %s\n", #call, cudaGetErrorString(code));               \
      exit(1);                                                                             \
    }                                                                                      \
  } while (0)

constexpr int rank_count_max = 8, token_count = 4096, row_byte_count = 14336, stage_count = 3;
constexpr int top_k = 8, expert_count = 256;

struct Job {
  const char *sources[rank_count_max];
  char *targets[rank_count_max];
  // [rank, token, destination]: the row there, -1 for none.
  const int *rows;
  // One for each rank, 128 bytes apart.
  int *counters;
  int rank_count;
  // Of the bytes loaded, so many halvings are stored.
  int shift;
};

template <int piece, int warp_count>
__global__ void __launch_bounds__(32 * warp_count) scatter(Job job) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  constexpr int pieces_per_row = row_byte_count / piece, run_length = pieces_per_row > 1 ? 2 : 1;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int worker_count = gridDim.x / job.rank_count, rank = blockIdx.x % job.rank_count, worker = blockIdx.x / job.rank_count;
  uint32_t memory = (uint32_t)__cvta_generic_to_shared(shared);
  uint32_t stages = memory + warp * stage_count * piece;
  uint32_t barriers = memory + warp_count * stage_count * piece + warp * stage_count * 8;
  if (lane == 0) {
    for (int stage = 0; stage < stage_count; stage++)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * stage) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();
  int next = warp * worker_count + worker, index = 0, end = 0;
  auto take_run = [&] {
    int run = __shfl_sync(~0u, next, 0);
    index = min(token_count * pieces_per_row, run * run_length);
    end = min(token_count * pieces_per_row, index + run_length);
    if (lane == 0) next = atomicAdd(job.counters + rank * 32, 1) + worker_count * warp_count;
  };
  auto load = [&](int use) {
    if (index >= end) return -1;
    int stage = use % stage_count, taken = index;
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barriers + 8 * stage), "r"(piece) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       stages + stage * piece),
                   "l"(job.sources[rank] + (size_t)taken * piece), "r"(piece), "r"(barriers + 8 * stage)
                   : "memory");
    }
    if (++index == end) take_run();
    return taken;
  };
  take_run();
  int current = load(0), following = load(1);
  for (int use = 0; current >= 0; use++) {
    int stage = use % stage_count;
    asm volatile(
        "{\n.reg .pred there;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n@!there bra again;\n}" ::"r"(barriers + 8 * stage),
        "r"(use / stage_count & 1)
        : "memory");
    int token = current / pieces_per_row, offset = current % pieces_per_row * piece >> job.shift;
    int row = lane < job.rank_count ? job.rows[(rank * token_count + token) * job.rank_count + lane] : -1;
    for (unsigned left = __ballot_sync(~0u, row >= 0); left; left &= left - 1) {
      int destination = __ffs(left) - 1;
      size_t place = __shfl_sync(~0u, row, destination);
      if (lane == 0)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                         job.targets[destination] + place * (row_byte_count >> job.shift) + offset),
                     "r"(stages + stage * piece), "r"(piece >> job.shift)
                     : "memory");
    }
    if (lane == 0) asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 1;" ::: "memory");
    int third = load(use + 2);
    current = following;
    following = third;
  }
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

template <class Prepare, class Run>
double median(Prepare prepare, Run run) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < 9; round++) {
    prepare();
    CHECK(cudaEventRecord(begin));
    run();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    times.emplace_back();
    CHECK(cudaEventElapsedTime(&times.back(), begin, end));
  }
  std::sort(times.begin(), times.end());
  return 1000 * times[times.size() / 2];
}

template <int piece, int warp_count>
void measure(Job job, int block_count, double floor) {
  // So much that a multiprocessor has room for one block alone.
  int byte_count = std::max(120 << 10, warp_count * stage_count * (piece + 8));
  CHECK(cudaFuncSetAttribute(scatter<piece, warp_count>, cudaFuncAttributeMaxDynamicSharedMemorySize, byte_count));
  double time = median([&] { CHECK(cudaMemsetAsync(job.counters, 0, 128 * rank_count_max)); },
                       [&] { scatter<piece, warp_count><<<block_count, 32 * warp_count, byte_count>>>(job); });
  printf("  %5d bytes, %2d warps: %6.1f us, %.2f\n", piece, warp_count, time, time / floor);
}

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  if (properties.major < 9) {
    fprintf(stderr, "scatter: wants a GPU with bulk copies, sm_90 or later: this one is sm_%d%d\n", properties.major, properties.minor);
    return 1;
  }
  size_t copied = (size_t)512 << 20;
  char *from, *to;
  CHECK(cudaMalloc(&from, copied));
  CHECK(cudaMalloc(&to, copied));
  // Bytes a microsecond.
  double bandwidth = 2 * copied / median([] {}, [&] { CHECK(cudaMemcpyAsync(to, from, copied, cudaMemcpyDeviceToDevice)); });
  printf("the driver's copy: %.2f TB/s\n", bandwidth / 1e6);
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
  for (int rank_count : {4, 8}) {
    // A rank's rows lie by source, then by token.
    std::mt19937 random(1);
    std::vector<int> rows((size_t)rank_count * token_count * rank_count, -1), next(rank_count, 0);
    std::vector<int> experts(expert_count);
    for (int expert = 0; expert < expert_count; expert++) experts[expert] = expert;
    size_t row_count = 0;
    for (size_t token = 0; token < (size_t)rank_count * token_count; token++) {
      for (int slot = 0; slot < top_k; slot++) {
        std::swap(experts[slot], experts[slot + random() % (expert_count - slot)]);
        int &row = rows[token * rank_count + experts[slot] / (expert_count / rank_count)];
        if (row < 0) row = next[&row - &rows[token * rank_count]]++, row_count++;
      }
    }
    Job job = {};
    job.rank_count = rank_count;
    int *device_rows;
    CHECK(cudaMalloc(&device_rows, rows.size() * sizeof(int)));
    CHECK(cudaMemcpy(device_rows, rows.data(), rows.size() * sizeof(int), cudaMemcpyHostToDevice));
    CHECK(cudaMalloc(&job.counters, 128 * rank_count_max));
    job.rows = device_rows;
    for (int rank = 0; rank < rank_count; rank++) {
      char *source;
      CHECK(cudaMalloc(&source, (size_t)token_count * row_byte_count));
      CHECK(cudaMalloc(&job.targets[rank], (size_t)rank_count * token_count * row_byte_count));
      job.sources[rank] = source;
    }
    for (job.shift = 0; job.shift < 2; job.shift++) {
      for (int worker_count : rank_count == 4 ? std::vector<int>{24, 33} : std::vector<int>{16}) {
        size_t read = (size_t)rank_count * token_count * row_byte_count, written = row_count * (row_byte_count >> job.shift);
        double floor = (read + written) / bandwidth;
        printf("%d x %d, %s written: floor %.1f us\n", rank_count, worker_count, job.shift ? "half" : "all", floor);
        measure<3584, 16>(job, rank_count * worker_count, floor);
        measure<3584, 8>(job, rank_count * worker_count, floor);
        measure<1792, 16>(job, rank_count * worker_count, floor);
        measure<7168, 8>(job, rank_count * worker_count, floor);
        measure<14336, 4>(job, rank_count * worker_count, floor);
      }
    }
    for (int rank = 0; rank < rank_count; rank++) {
      CHECK(cudaFree((void *)job.sources[rank]));
      CHECK(cudaFree(job.targets[rank]));
    }
    CHECK(cudaFree(device_rows));
    CHECK(cudaFree(job.counters));
  }
}
