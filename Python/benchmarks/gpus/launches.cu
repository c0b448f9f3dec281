// How long an operation takes that moves nothing: kernels of ranks that share one GPU, 200 in a row in a graph, in which a rank's
// blocks meet, its last one signals all ranks, and waits for theirs, once or twice. What a dispatch or a combine of one token takes
// longer than two such signals, it takes for what it finds out.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -o launches launches.cu && ./launches
//
// Prints the medians of 7 graphs in microseconds a kernel, of the slowest rank: with kernels that follow each other, and with kernels
// that may start before the one before has ended (programmatic stream serialization), which then wait for that.
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                         \
  do {                                                                                      \
    cudaError_t code = (call);                                                              \
    if (code != cudaSuccess) {                                                              \
      fprintf(stderr, "launches: %s: %s\n", #call, cudaGetErrorString(code));               \
      exit(1);                                                                              \
    }                                                                                       \
  } while (0)

constexpr int rank_count_max = 8, thread_count = 512, kernel_count = 200, round_count = 7;

struct alignas(128) Rank {
  uint64_t epoch;
  uint32_t counter;
  // [signal, source, epoch modulo 8]
  uint64_t signals[2][rank_count_max][8];
};

// As many bytes as the library's arguments have, about.
struct Arguments {
  Rank *ranks;
  int rank, rank_count, signal_count;
  uint64_t others[176];
};

template <bool overlaps>
__global__ void __launch_bounds__(thread_count, 1) operation(const __grid_constant__ Arguments arguments) {
  __shared__ bool is_last;
  if (overlaps) asm volatile("griddepcontrol.wait;" ::: "memory");
  if (arguments.signal_count == 0) return;
  Rank *own = arguments.ranks + arguments.rank;
  const uint64_t epoch = *(volatile uint64_t *)&own->epoch + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t before = 0;
    if (gridDim.x > 1)
      asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&own->counter) : "memory");
    is_last = before + 1 == gridDim.x;
    if (is_last) own->counter = 0;
  }
  __syncthreads();
  if (!is_last) {
    if (overlaps) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    return;
  }
  const int peer = threadIdx.x;
  for (int signal = 0; signal < arguments.signal_count; signal++) {
    if (peer < arguments.rank_count) {
      uint64_t *theirs = &arguments.ranks[peer].signals[signal][arguments.rank][epoch & 7];
      asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(theirs), "l"(epoch) : "memory");
      // Bounded: some would never come if not all ranks ran at once.
      uint64_t found = 0;
      for (int turn = 0; turn < 300000 && found < epoch; turn++)
        asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(found) : "l"(&own->signals[signal][peer][epoch & 7]) : "memory");
    }
    __syncthreads();
    // All ranks run: none waits for a place that the next kernels take.
    if (overlaps && signal == 0) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  }
  if (threadIdx.x == 0) own->epoch = epoch;
}

template <bool overlaps> double measure(Rank *ranks, int rank_count, int block_count, int shared_byte_count, int signal_count) {
  CHECK(cudaFuncSetAttribute(operation<overlaps>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_byte_count));
  CHECK(cudaMemset(ranks, 0, sizeof(Rank) * rank_count_max));
  std::vector<cudaStream_t> streams(rank_count);
  std::vector<cudaGraphExec_t> graphs(rank_count);
  std::vector<cudaEvent_t> begins(rank_count), ends(rank_count);
  for (int rank = 0; rank < rank_count; rank++) {
    CHECK(cudaStreamCreateWithFlags(&streams[rank], cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begins[rank]));
    CHECK(cudaEventCreate(&ends[rank]));
    CHECK(cudaStreamBeginCapture(streams[rank], cudaStreamCaptureModeThreadLocal));
    for (int index = 0; index < kernel_count; index++) {
      cudaLaunchAttribute attribute = {};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = block_count;
      config.blockDim = thread_count;
      config.dynamicSmemBytes = shared_byte_count;
      config.stream = streams[rank];
      config.attrs = &attribute;
      config.numAttrs = overlaps && index > 0 ? 1 : 0;
      CHECK(cudaLaunchKernelEx(&config, operation<overlaps>, Arguments{ranks, rank, rank_count, signal_count, {}}));
    }
    cudaGraph_t graph;
    CHECK(cudaStreamEndCapture(streams[rank], &graph));
    CHECK(cudaGraphInstantiate(&graphs[rank], graph, 0));
    CHECK(cudaGraphUpload(graphs[rank], streams[rank]));
    CHECK(cudaGraphDestroy(graph));
  }
  CHECK(cudaDeviceSynchronize());
  std::vector<double> times;
  for (int round = 0; round < round_count; round++) {
    for (int rank = 0; rank < rank_count; rank++) {
      CHECK(cudaEventRecord(begins[rank], streams[rank]));
      CHECK(cudaGraphLaunch(graphs[rank], streams[rank]));
      CHECK(cudaEventRecord(ends[rank], streams[rank]));
    }
    CHECK(cudaDeviceSynchronize());
    float slowest = 0, milliseconds;
    for (int rank = 0; rank < rank_count; rank++) {
      CHECK(cudaEventElapsedTime(&milliseconds, begins[rank], ends[rank]));
      slowest = std::max(slowest, milliseconds);
    }
    times.push_back(1000.0 * slowest / kernel_count);
  }
  for (int rank = 0; rank < rank_count; rank++) {
    CHECK(cudaGraphExecDestroy(graphs[rank]));
    CHECK(cudaEventDestroy(begins[rank]));
    CHECK(cudaEventDestroy(ends[rank]));
    CHECK(cudaStreamDestroy(streams[rank]));
  }
  std::sort(times.begin(), times.end());
  return times[round_count / 2];
}

int main() {
  // Each rank's kernels in a queue of the hardware's own.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  Rank *ranks;
  CHECK(cudaMalloc(&ranks, sizeof(Rank) * rank_count_max));
  printf("| ranks x blocks | bytes of shared memory | signals | one behind the other | overlapping |\n|---|---|---|---|---|\n");
  for (int rank_count : {1, 8})
    for (int block_count : {1, 16})
      for (int shared_byte_count : {0, 202752})
        for (int signal_count : {0, 1, 2})
          printf(
            "| %d x %d | %d | %d | %.2f us | %.2f us |\n", rank_count, block_count, shared_byte_count, signal_count,
            measure<false>(ranks, rank_count, block_count, shared_byte_count, signal_count),
            measure<true>(ranks, rank_count, block_count, shared_byte_count, signal_count));
  CHECK(cudaFree(ranks));
}
