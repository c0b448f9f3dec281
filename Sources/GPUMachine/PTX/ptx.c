#include "ptx.h"

// Volatile and with a clobber of memory wherever order counts; convergent wherever lanes act together.
#define PTX __attribute__((always_inline, convergent))

typedef __attribute__((address_space(3))) char shared_char;
extern shared_char __attribute__((aligned(128))) swiftep_shared[];

/// Threads of a block, and bytes of dynamic shared memory, that the kernels are made for: the host reads them.
__attribute__((used)) const uint32_t swiftep_block_shape[2] = {BLOCK_THREADS, BLOCK_SHARED_BYTES};

PTX void *ptx_shared(void) { return (void *)swiftep_shared; }

static inline __attribute__((always_inline)) uint32_t at(uint32_t offset) {
  return (uint32_t)(uintptr_t)swiftep_shared + offset;
}

PTX void ptx_block_barrier(void) { __asm__ volatile("bar.sync 0;" ::: "memory"); }
PTX void ptx_warp_barrier(void) { __asm__ volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

PTX uint32_t ptx_ballot(uint32_t predicate) {
  uint32_t lanes;
  __asm__ volatile(
      "{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }" : "=r"(lanes) : "r"(predicate));
  return lanes;
}

PTX uint32_t ptx_shuffle(uint32_t value, uint32_t lane) {
  uint32_t result;
  __asm__ volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(result) : "r"(value), "r"(lane));
  return result;
}

PTX uint32_t ptx_shuffle_up(uint32_t value, uint32_t distance) {
  uint32_t result;
  __asm__ volatile("shfl.sync.up.b32 %0, %1, %2, 0, 0xffffffff;" : "=r"(result) : "r"(value), "r"(distance));
  return result;
}

PTX uint32_t ptx_shuffle_xor(uint32_t value, uint32_t mask) {
  uint32_t result;
  __asm__ volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(result) : "r"(value), "r"(mask));
  return result;
}

PTX uint32_t ptx_max_pair(uint32_t a, uint32_t b) {
#if SM >= 90
  uint32_t result;
  __asm__("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  uint32_t low_a = a & 0xffff, low_b = b & 0xffff, high_a = a >> 16, high_b = b >> 16;
  return (low_a > low_b ? low_a : low_b) | (high_a > high_b ? high_a : high_b) << 16;
#endif
}

PTX uint32_t ptx_max_signed_pair(uint32_t a, uint32_t b) {
#if SM >= 90
  uint32_t result;
  __asm__("max.s16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  int16_t low_a = (int16_t)a, low_b = (int16_t)b, high_a = (int16_t)(a >> 16), high_b = (int16_t)(b >> 16);
  return (uint16_t)(low_a > low_b ? low_a : low_b) | (uint32_t)(uint16_t)(high_a > high_b ? high_a : high_b) << 16;
#endif
}

PTX float ptx_reciprocal(float value) {
  float result;
  __asm__("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

PTX int32_t ptx_sum(int32_t value) {
  int32_t sum;
  __asm__ volatile("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(sum) : "r"(value));
  return sum;
}

PTX uint32_t ptx_match(uint32_t value) {
  uint32_t lanes;
  __asm__ volatile("match.any.sync.b32 %0, %1, 0xffffffff;" : "=r"(lanes) : "r"(value));
  return lanes;
}

// One of two instructions, without a branch: LLVM would have each loop twice that asks for one of them.
#define FOR_PEERS(system, on_system, on_gpu) \
  "{\n\t.reg .pred system;\n\tsetp.ne.b32 system, " system ", 0;\n\t@system " on_system ";\n\t@!system " on_gpu ";\n\t}"

PTX void ptx_fence_system(uint32_t system) {
  __asm__ volatile("{\n\t.reg .pred system;\n\tsetp.ne.b32 system, %0, 0;\n\t@system fence.acq_rel.sys;\n\t}"::"r"(system)
                   : "memory");
}

PTX uint64_t ptx_load_acquire_peers(uint64_t address, uint32_t system) {
  uint64_t value;
  __asm__ volatile(FOR_PEERS("%2", "ld.acquire.sys.global.u64 %0, [%1]", "ld.acquire.gpu.global.u64 %0, [%1]")
                   : "=l"(value)
                   : "l"(address), "r"(system)
                   : "memory");
  return value;
}

PTX void ptx_store_release_peers(uint64_t address, uint64_t value, uint32_t system) {
  __asm__ volatile(FOR_PEERS("%2", "st.release.sys.global.u64 [%0], %1", "st.release.gpu.global.u64 [%0], %1")::"l"(address),
                   "l"(value), "r"(system)
                   : "memory");
}

PTX uint64_t ptx_load_acquire_gpu(uint64_t address) {
  uint64_t value;
  __asm__ volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

PTX void ptx_store_release_gpu(uint64_t address, uint64_t value) {
  __asm__ volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

PTX uint64_t ptx_load_acquire(uint64_t address) {
  uint64_t value;
  __asm__ volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

PTX void ptx_store_release(uint64_t address, uint64_t value) {
  __asm__ volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

PTX void ptx_prefetch(uint64_t address) { __asm__ volatile("prefetch.global.L1 [%0];" ::"l"(address)); }

PTX uint64_t ptx_load_relaxed(uint64_t address) {
  uint64_t value;
  __asm__ volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address));
  return value;
}

PTX void ptx_store_relaxed(uint64_t address, uint64_t value) {
  __asm__ volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

PTX uint32_t ptx_add(uint64_t address, uint32_t value) {
  uint32_t before;
  __asm__ volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

PTX uint32_t ptx_take(uint64_t address) {
  uint32_t before;
  // Not `add`, of which drivers make one addition for all lanes, whose result they have to wait for. (Some compilers see through
  // it.)
  __asm__ volatile("atom.global.inc.u32 %0, [%1], 0xffffffff;" : "=r"(before) : "l"(address) : "memory");
  return before;
}

PTX void ptx_add_only(uint64_t address, uint32_t value) {
  __asm__ volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

PTX uint32_t ptx_shared_add(uint32_t offset, uint32_t value) {
  uint32_t before;
  __asm__ volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(at(offset)), "r"(value) : "memory");
  return before;
}

PTX void ptx_no_unroll(void) { __asm__ volatile(".pragma \"nounroll\";"); }

PTX uint64_t ptx_nanoseconds(void) {
  uint64_t value;
  __asm__ volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
  return value;
}

PTX uint32_t ptx_bf16x2(float low, float high) {
  uint32_t pair;
  __asm__("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#if SM >= 90
PTX void ptx_await_previous(void) { __asm__ volatile("griddepcontrol.wait;" ::: "memory"); }
PTX void ptx_start_next(void) { __asm__ volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

PTX void ptx_fence_proxy(void) { __asm__ volatile("fence.proxy.async.global;" ::: "memory"); }
PTX void ptx_fence_proxy_shared(void) { __asm__ volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

PTX void ptx_phase_init(uint32_t barrier) {
  __asm__ volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at(barrier)) : "memory");
}

PTX void ptx_phase_expect(uint32_t barrier, uint32_t byte_count) {
  __asm__ volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at(barrier)), "r"(byte_count)
      : "memory");
}

PTX void ptx_bulk_load(uint32_t to, uint64_t from, uint32_t byte_count, uint32_t barrier) {
  __asm__ volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at(to)), "l"(from),
      "r"(byte_count), "r"(at(barrier))
      : "memory");
}

PTX void ptx_phase_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    __asm__ volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(at(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

PTX void ptx_bulk_store(uint64_t to, uint32_t from, uint32_t byte_count) {
  __asm__ volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(at(from)), "r"(byte_count)
      : "memory");
}

PTX void ptx_bulk_commit(void) { __asm__ volatile("cp.async.bulk.commit_group;" ::: "memory"); }
PTX void ptx_bulk_wait_read_but_one(void) { __asm__ volatile("cp.async.bulk.wait_group.read 1;" ::: "memory"); }
PTX void ptx_bulk_wait(void) { __asm__ volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

PTX uint32_t ptx_e4m3x2(float low, float high) {
  uint16_t pair;
  __asm__("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

PTX uint32_t ptx_e4m3x4(float a, float b, float c, float d) {
  uint32_t codes;
  __asm__("{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; "
          "mov.b32 %0, {low, high}; }"
          : "=r"(codes)
          : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
}
#endif
