// PTX that LLVM has no portable name for, one instruction each; `ptx.c` has the bodies. Swift sees only these declarations: it is compiled for
// another processor, whose calling convention agrees on integers, floats and pointers, and on nothing larger.
//
// Shared memory is named by offsets into the block's dynamic shared memory; global memory by 64-bit addresses.

#ifndef SWIFTEP_PTX_H
#define SWIFTEP_PTX_H

#include <stdint.h>

// MARK: Where this lane is

// Elsewhere, lanes are emulated.
#if defined(__riscv) || defined(__NVPTX__)
#define PTX_REGISTER(name) __asm__("llvm.nvvm.read.ptx.sreg." name)
#else
#define PTX_REGISTER(name)
#endif

int32_t ptx_thread_index(void) PTX_REGISTER("tid.x");
int32_t ptx_block_index(void) PTX_REGISTER("ctaid.x");
int32_t ptx_block_row(void) PTX_REGISTER("ctaid.y");
int32_t ptx_block_count(void) PTX_REGISTER("nctaid.x");

/// The block's dynamic shared memory.
void *ptx_shared(void);

// MARK: Collectives: all lanes of a warp, or of a block, call them together

void ptx_block_barrier(void);
void ptx_warp_barrier(void);
uint32_t ptx_ballot(uint32_t predicate);
uint32_t ptx_shuffle(uint32_t value, uint32_t lane);
uint32_t ptx_shuffle_up(uint32_t value, uint32_t distance);
uint32_t ptx_shuffle_xor(uint32_t value, uint32_t mask);
/// The sum of all lanes' values.
int32_t ptx_sum(int32_t value);
/// The lanes whose value is this lane's.
uint32_t ptx_match(uint32_t value);

// MARK: Order

/// Nothing if `system` is 0.
void ptx_fence_system(uint32_t system);
/// What ends with `_peers` is ordered for the whole system, or, if that is 0, for the GPU's own threads.
uint64_t ptx_load_acquire_peers(uint64_t address, uint32_t system);
void ptx_store_release_peers(uint64_t address, uint64_t value, uint32_t system);
/// Orders bulk copies of global memory after ordinary accesses to it that came before.
void ptx_fence_proxy(void);
/// The same of shared memory.
void ptx_fence_proxy_shared(void);
uint64_t ptx_load_acquire(uint64_t address);
/// What ends with `_gpu` is ordered for the GPU's own threads only.
uint64_t ptx_load_acquire_gpu(uint64_t address);
void ptx_store_release(uint64_t address, uint64_t value);
void ptx_store_release_gpu(uint64_t address, uint64_t value);
/// Of a line, into the multiprocessor's cache.
void ptx_prefetch(uint64_t address);
uint64_t ptx_load_relaxed(uint64_t address);
void ptx_store_relaxed(uint64_t address, uint64_t value);
/// Releases and acquires, for this GPU; returns the value before.
uint32_t ptx_add(uint64_t address, uint32_t value);
/// As `ptx_add` of 1, where it is a number that is wanted, and no order.
uint32_t ptx_take(uint64_t address);
void ptx_add_only(uint64_t address, uint32_t value);
uint32_t ptx_shared_add(uint32_t offset, uint32_t value);
uint64_t ptx_nanoseconds(void);
/// At the beginning of a loop's body: the driver's compiler leaves it one loop.
void ptx_no_unroll(void);

// MARK: Launches that overlap, from sm_90 on

/// Returns when the launch before this one is over and what it stored is seen, if this one was started earlier.
void ptx_await_previous(void);
/// The launch behind this one may be started: when all blocks of this one have said so, or have ended.
void ptx_start_next(void);

// MARK: Bulk copies, from sm_90 on. Sizes and addresses are multiples of 16.

/// One arrival a phase: that of the lane that says how many bytes complete it.
void ptx_phase_init(uint32_t barrier);
void ptx_phase_expect(uint32_t barrier, uint32_t byte_count);
/// Starts a copy to shared memory, whose bytes the barrier's phase expects.
void ptx_bulk_load(uint32_t to, uint64_t from, uint32_t byte_count, uint32_t barrier);
/// Returns when the phase of this parity is complete.
void ptx_phase_wait(uint32_t barrier, uint32_t parity);
void ptx_bulk_store(uint64_t to, uint32_t from, uint32_t byte_count);
/// Ends a group of this lane's stores.
void ptx_bulk_commit(void);
/// Returns when all of this lane's groups but the last have read their shared memory.
void ptx_bulk_wait_read_but_one(void);
/// Returns when all of this lane's stores are done.
void ptx_bulk_wait(void);

// MARK: Formats

/// The greater of two unsigned 16-bit numbers, for the low and the high halves.
uint32_t ptx_max_pair(uint32_t a, uint32_t b);
/// The same of signed ones.
uint32_t ptx_max_signed_pair(uint32_t a, uint32_t b);
/// The reciprocal of a number from 1 to 2, whose last digit may be off by one.
float ptx_reciprocal(float value);
/// Two BF16, rounded to nearest even; NaN becomes 0x7fff.
uint32_t ptx_bf16x2(float low, float high);
/// Two FP8 E4M3, rounded to nearest even, saturating; NaN becomes 0x7f. From sm_89 on.
uint32_t ptx_e4m3x2(float low, float high);
/// Four of them, the first in the lowest byte.
uint32_t ptx_e4m3x4(float a, float b, float c, float d);

#endif
