// How fast kernels copy to and from the memory of other GPUs: all GPUs at once, each with all of its peers.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -o link link.cu && ./link [--workers 2,4,8] [--megabytes 256] [--rounds 5]
//
// Prints JSON: for each number of blocks, one a multiprocessor, the gigabytes (1e9) a second of the slowest GPU, in the best round.
// "bulk" copies pieces of 4 KB through shared memory by the bulk copy engine of a multiprocessor (sm_90), as the library's kernels
// do; "vector" has 16-byte loads and stores, eight in flight a thread. "engine" is cudaMemcpyAsync. "write" stores into a peer's
// memory, "read" loads from it. With one GPU, its own memory takes the place of the peers', so that the program can be tried.
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define CHECK(call)                                                                        \
  do {                                                                                     \
    cudaError_t code = (call);                                                             \
    if (code != cudaSuccess) {                                                             \
      fprintf(stderr, "link: %s: %s\n", #call, cudaGetErrorString(code));                  \
      exit(1);                                                                             \
    }                                                                                      \
  } while (0)

constexpr int peer_count_max = 16;
constexpr int thread_count = 1024;

// What one GPU copies: a piece from each source to its target, all of one size.
struct Copies {
  const char *sources[peer_count_max];
  char *targets[peer_count_max];
  int count;
  size_t byte_count;
};

// Blocks share every piece, so that all peers are copied to at once for as long as the copy takes.
__global__ void __launch_bounds__(thread_count) copy_vector(Copies copies) {
  constexpr int depth = 8;
  size_t total = copies.byte_count / 16;
  for (size_t first = (size_t)blockIdx.x * thread_count * depth; first < total; first += (size_t)gridDim.x * thread_count * depth) {
    for (int peer = 0; peer < copies.count; peer++) {
      // Blocks begin with different peers.
      int place = (peer + blockIdx.x) % copies.count;
      const int4 *source = (const int4 *)copies.sources[place];
      int4 *target = (int4 *)copies.targets[place];
      int4 values[depth];
#pragma unroll
      for (int i = 0; i < depth; i++) {
        size_t index = first + i * thread_count + threadIdx.x;
        if (index < total) values[i] = __ldcs(source + index);
      }
#pragma unroll
      for (int i = 0; i < depth; i++) {
        size_t index = first + i * thread_count + threadIdx.x;
        if (index < total) __stcs(target + index, values[i]);
      }
    }
  }
}

// Bulk copies: each of 16 warps has a lane that loads a piece while it stores the two before.
constexpr int warp_count = 16, stage_count = 3, piece_byte_count = 4096;
constexpr int shared_byte_count = warp_count * stage_count * piece_byte_count + warp_count * stage_count * 8;

__global__ void __launch_bounds__(32 * warp_count) copy_bulk(Copies copies) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 != 0) return;
  uint32_t stages = (uint32_t)__cvta_generic_to_shared(shared) + warp * stage_count * piece_byte_count;
  uint32_t barriers =
      (uint32_t)__cvta_generic_to_shared(shared) + warp_count * stage_count * piece_byte_count + warp * stage_count * 8;
  for (int stage = 0; stage < stage_count; stage++)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * stage) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  size_t pieces = copies.byte_count / piece_byte_count * copies.count;
  size_t step = (size_t)gridDim.x * warp_count;
  size_t begin = (size_t)blockIdx.x * warp_count + warp;
  auto load = [&](size_t piece, int stage) {
    const char *source = copies.sources[piece % copies.count] + piece / copies.count * piece_byte_count;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barriers + 8 * stage), "r"(piece_byte_count)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            stages + stage * piece_byte_count),
        "l"(__cvta_generic_to_global(source)), "r"(piece_byte_count), "r"(barriers + 8 * stage)
        : "memory");
  };
  if (begin < pieces) load(begin, 0);
  uint32_t turn = 0;
  for (size_t piece = begin; piece < pieces; piece += step, turn++) {
    int stage = turn % stage_count;
    if (piece + step < pieces) {
      // The next stage's last store, the one before the last, has read its memory before that is loaded anew.
      asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      load(piece + step, (turn + 1) % stage_count);
    }
    uint32_t parity = turn / stage_count % 2, is_done = 0;
    while (!is_done)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(is_done)
          : "r"(barriers + 8 * stage), "r"(parity)
          : "memory");
    char *target = copies.targets[piece % copies.count] + piece / copies.count * piece_byte_count;
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(target)),
                 "r"(stages + stage * piece_byte_count), "r"(piece_byte_count)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

enum Way { engine, vector_kernel, bulk_kernel };

struct Part {
  char *source, *target;
  cudaStream_t stream;
  std::vector<cudaStream_t> lanes;
  std::vector<cudaEvent_t> lane_ends;
  cudaEvent_t start, end;
};

static std::vector<Part> parts;
static size_t piece_size;
static int *gate;

// Holds a stream until the host opens the gate, but not for ever: one block, which the copies of the same stream wait for.
__global__ void hold(volatile int *gate, int opening) {
  for (int turn = 0; *gate < opening && turn < 50000000; turn++) __nanosleep(100);
}

static Copies copies_of(int gpu, bool is_write) {
  Copies copies{};
  int count = (int)parts.size();
  copies.count = std::max(1, count - 1);
  copies.byte_count = piece_size;
  for (int place = 0; place < copies.count; place++) {
    int peer = count == 1 ? 0 : (gpu + place + 1) % count;
    // Where the peer has this GPU's piece.
    int place_there = count == 1 ? 0 : count - 2 - place;
    copies.sources[place] = is_write ? parts[gpu].source + place * piece_size : parts[peer].source + place_there * piece_size;
    copies.targets[place] = is_write ? parts[peer].target + place_there * piece_size : parts[gpu].target + place * piece_size;
  }
  return copies;
}

static void queue(int gpu, Way way, bool is_write, int block_count) {
  constexpr int repeat_count = 4;
  Part &part = parts[gpu];
  Copies copies = copies_of(gpu, is_write);
  CHECK(cudaEventRecord(part.start, part.stream));
  if (way == engine) {
    for (int place = 0; place < copies.count; place++) {
      CHECK(cudaStreamWaitEvent(part.lanes[place], part.start, 0));
      for (int i = 0; i < repeat_count; i++)
        CHECK(cudaMemcpyAsync(
            copies.targets[place], copies.sources[place], piece_size, cudaMemcpyDeviceToDevice, part.lanes[place]));
      CHECK(cudaEventRecord(part.lane_ends[place], part.lanes[place]));
      CHECK(cudaStreamWaitEvent(part.stream, part.lane_ends[place], 0));
    }
  } else {
    for (int i = 0; i < repeat_count; i++) {
      if (way == vector_kernel)
        copy_vector<<<block_count, thread_count, 0, part.stream>>>(copies);
      else
        copy_bulk<<<block_count, 32 * warp_count, shared_byte_count, part.stream>>>(copies);
      CHECK(cudaGetLastError());
    }
  }
  CHECK(cudaEventRecord(part.end, part.stream));
}

// Gigabytes a second of the slowest GPU, in the round in which that is most. A first one is not counted, and its gate is open: what
// the driver makes for a first copy may wait for all that is queued.
static double measure(Way way, bool is_write, int block_count, int round_count) {
  static int opening = 0;
  double best = 0;
  for (int round = -1; round < round_count; round++) {
    opening++;
    if (round < 0) *(volatile int *)gate = opening;
    for (int gpu = 0; gpu < (int)parts.size(); gpu++) {
      CHECK(cudaSetDevice(gpu));
      hold<<<1, 1, 0, parts[gpu].stream>>>(gate, opening);
      CHECK(cudaGetLastError());
      queue(gpu, way, is_write, block_count);
    }
    *(volatile int *)gate = opening;
    double slowest = 1e30;
    for (size_t gpu = 0; gpu < parts.size(); gpu++) {
      CHECK(cudaSetDevice((int)gpu));
      CHECK(cudaStreamSynchronize(parts[gpu].stream));
      float milliseconds;
      CHECK(cudaEventElapsedTime(&milliseconds, parts[gpu].start, parts[gpu].end));
      double byte_count = 4.0 * piece_size * std::max<size_t>(1, parts.size() - 1);
      slowest = std::min(slowest, byte_count / (1e6 * milliseconds));
    }
    if (round >= 0) best = std::max(best, slowest);
  }
  return best;
}

// Whether a copy brings what was sent: piece by piece, of all GPUs.
static void check(Way way, bool is_write, int block_count) {
  int count = (int)parts.size(), peer_count = std::max(1, count - 1);
  for (int gpu = 0; gpu < count; gpu++) {
    CHECK(cudaSetDevice(gpu));
    for (int place = 0; place < peer_count; place++)
      CHECK(cudaMemset(parts[gpu].source + place * piece_size, 1 + gpu * peer_count + place, piece_size));
    CHECK(cudaMemset(parts[gpu].target, 0, piece_size * peer_count));
    CHECK(cudaDeviceSynchronize());
  }
  measure(way, is_write, block_count, 0);
  std::vector<unsigned char> bytes(piece_size);
  for (int gpu = 0; gpu < count; gpu++) {
    for (int place = 0; place < peer_count; place++) {
      int peer = count == 1 ? 0 : (gpu + place + 1) % count;
      int place_there = count == 1 ? 0 : count - 2 - place;
      CHECK(cudaSetDevice(gpu));
      CHECK(cudaMemcpy(bytes.data(), parts[gpu].target + place * piece_size, piece_size, cudaMemcpyDeviceToHost));
      unsigned char expected = 1 + peer * peer_count + place_there;
      for (unsigned char byte : bytes)
        if (byte != expected) {
          fprintf(stderr, "link: GPU %d: expected %d from GPU %d, found %d\n", gpu, expected, peer, byte);
          exit(1);
        }
    }
  }
}

int main(int argument_count, char **arguments) {
  std::vector<int> workers = {2, 4, 6, 8, 12, 16, 24};
  size_t megabytes = 256;
  int rounds = 5;
  for (int i = 1; i + 1 < argument_count; i += 2) {
    if (!strcmp(arguments[i], "--megabytes")) megabytes = strtoul(arguments[i + 1], nullptr, 10);
    if (!strcmp(arguments[i], "--rounds")) rounds = atoi(arguments[i + 1]);
    if (!strcmp(arguments[i], "--workers")) {
      workers.clear();
      for (char *word = strtok(arguments[i + 1], ","); word; word = strtok(nullptr, ",")) workers.push_back(atoi(word));
    }
  }
  // Code that is loaded late might wait for a kernel that waits.
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  int count = 0;
  CHECK(cudaGetDeviceCount(&count));
  if (count > peer_count_max) count = peer_count_max;
  CHECK(cudaHostAlloc(&gate, 64, cudaHostAllocPortable | cudaHostAllocMapped));
  *gate = 0;
  int peer_count = std::max(1, count - 1);
  piece_size = (megabytes << 20) / peer_count / piece_byte_count * piece_byte_count;
  parts.resize(count);
  for (int gpu = 0; gpu < count; gpu++) {
    CHECK(cudaSetDevice(gpu));
    for (int peer = 0; peer < count; peer++) {
      if (peer == gpu) continue;
      int can = 0;
      CHECK(cudaDeviceCanAccessPeer(&can, gpu, peer));
      if (!can) {
        fprintf(stderr, "link: GPU %d does not reach the memory of GPU %d\n", gpu, peer);
        return 1;
      }
      CHECK(cudaDeviceEnablePeerAccess(peer, 0));
    }
    Part &part = parts[gpu];
    CHECK(cudaMalloc(&part.source, piece_size * peer_count));
    CHECK(cudaMalloc(&part.target, piece_size * peer_count));
    CHECK(cudaStreamCreateWithFlags(&part.stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&part.start));
    CHECK(cudaEventCreate(&part.end));
    part.lanes.resize(peer_count);
    part.lane_ends.resize(peer_count);
    for (int place = 0; place < peer_count; place++) {
      CHECK(cudaStreamCreateWithFlags(&part.lanes[place], cudaStreamNonBlocking));
      CHECK(cudaEventCreateWithFlags(&part.lane_ends[place], cudaEventDisableTiming));
    }
    CHECK(cudaFuncSetAttribute(copy_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_byte_count));
    // All code is loaded before any of it waits.
    hold<<<1, 1, 0, part.stream>>>(gate, 0);
    Copies nothing{};
    nothing.count = 1;
    copy_vector<<<1, thread_count, 0, part.stream>>>(nothing);
    copy_bulk<<<1, 32 * warp_count, shared_byte_count, part.stream>>>(nothing);
    CHECK(cudaStreamSynchronize(part.stream));
  }
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  bool has_bulk = properties.major >= 9;
  for (bool is_write : {true, false}) {
    check(engine, is_write, 0);
    check(vector_kernel, is_write, 3);
    if (has_bulk) check(bulk_kernel, is_write, 3);
  }
  printf("{\"gpus\": %d, \"gpu\": \"%s\", \"bytes\": %zu, \"own_memory\": %s,\n", count, properties.name,
         piece_size * peer_count, count == 1 ? "true" : "false");
  printf(" \"engine\": {\"write\": %.2f, \"read\": %.2f},\n \"kernels\": [", measure(engine, true, 0, rounds),
         measure(engine, false, 0, rounds));
  const char *separator = "\n";
  for (Way way : {bulk_kernel, vector_kernel}) {
    if (way == bulk_kernel && !has_bulk) continue;
    for (int blocks : workers) {
      double write = measure(way, true, blocks, rounds), read = measure(way, false, blocks, rounds);
      printf("%s  {\"kind\": \"%s\", \"workers\": %d, \"write\": %.2f, \"read\": %.2f}", separator,
             way == bulk_kernel ? "bulk" : "vector", blocks, write, read);
      separator = ",\n";
    }
  }
  printf("\n ]}\n");
}
