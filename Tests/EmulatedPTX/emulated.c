#include "emulated.h"
#include "ptx.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { WARP = 32, WARPS_MAX = 32, COPIES_MAX = 64 };

struct copy {
  char *to;
  const char *from;
  uint32_t byte_count;
  /// Of a load: where in shared memory its barrier lies. Of a store: its group.
  uint32_t tag;
};

struct warp {
  pthread_barrier_t barrier;
  uint32_t values[WARP];
};

struct block {
  uint32_t index, count;
  char *shared;
  uint32_t shared_byte_count;
  pthread_barrier_t barrier;
  struct warp warps[WARPS_MAX];
  pthread_mutex_t lock;
  struct copy loads[WARPS_MAX * COPIES_MAX];
  uint32_t load_count;
  _Atomic(const char *) fault;
};

struct lane {
  pthread_t thread;
  struct block *block;
  uint32_t index;
  void (*body)(void *);
  void *context;
  struct copy stores[COPIES_MAX];
  uint32_t store_count, group;
};

/// `mbarrier`, as far as one arrival a phase goes.
struct phase {
  int32_t missing_bytes;
  uint8_t has_arrived, parity, is_there;
};

static _Thread_local struct lane *self;

static void fault(const char *what) {
  const char *none = NULL;
  atomic_compare_exchange_strong(&self->block->fault, &none, what);
}

// MARK: Lanes

static void *run(void *lane) {
  self = lane;
  self->body(self->context);
  if (self->store_count > 0) fault("a bulk store that nobody waited for");
  return NULL;
}

const char *emulated_launch(
    uint32_t block_count, uint32_t thread_count, uint32_t shared_byte_count, void (*body)(void *), void *context) {
  const char *found = NULL;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 1 << 20);
  for (uint32_t index = 0; index < block_count && !found; index++) {
    struct block *block = calloc(1, sizeof *block);
    struct lane *lanes = calloc(thread_count, sizeof *lanes);
    block->index = index;
    block->count = block_count;
    block->shared = aligned_alloc(128, shared_byte_count);
    block->shared_byte_count = shared_byte_count;
    memset(block->shared, 0xa5, shared_byte_count);
    pthread_mutex_init(&block->lock, NULL);
    pthread_barrier_init(&block->barrier, NULL, thread_count);
    for (uint32_t warp = 0; warp < thread_count / WARP; warp++) pthread_barrier_init(&block->warps[warp].barrier, NULL, WARP);
    for (uint32_t lane = 0; lane < thread_count; lane++) {
      lanes[lane] = (struct lane){.block = block, .index = lane, .body = body, .context = context};
      if (pthread_create(&lanes[lane].thread, &attributes, run, &lanes[lane]) != 0) abort();
    }
    for (uint32_t lane = 0; lane < thread_count; lane++) pthread_join(lanes[lane].thread, NULL);
    if (block->load_count > 0) found = "a bulk load that nobody waited for";
    if (block->fault) found = block->fault;
    for (uint32_t warp = 0; warp < thread_count / WARP; warp++) pthread_barrier_destroy(&block->warps[warp].barrier);
    pthread_barrier_destroy(&block->barrier);
    pthread_mutex_destroy(&block->lock);
    free(block->shared);
    free(lanes);
    free(block);
  }
  pthread_attr_destroy(&attributes);
  return found;
}

int32_t ptx_thread_index(void) { return (int32_t)self->index; }
int32_t ptx_block_index(void) { return (int32_t)self->block->index; }
int32_t ptx_block_row(void) { return 0; }
int32_t ptx_block_count(void) { return (int32_t)self->block->count; }
void *ptx_shared(void) { return self->block->shared; }

// MARK: Collectives

static struct warp *warp(void) { return &self->block->warps[self->index / WARP]; }
static uint32_t lane(void) { return self->index % WARP; }

void ptx_block_barrier(void) { pthread_barrier_wait(&self->block->barrier); }
void ptx_warp_barrier(void) { pthread_barrier_wait(&warp()->barrier); }

/// All lanes' values, until `done`.
static const uint32_t *all(uint32_t value) {
  warp()->values[lane()] = value;
  ptx_warp_barrier();
  return warp()->values;
}

static uint32_t done(uint32_t result) {
  ptx_warp_barrier();
  return result;
}

uint32_t ptx_ballot(uint32_t predicate) {
  const uint32_t *values = all(predicate);
  uint32_t lanes = 0;
  for (uint32_t other = 0; other < WARP; other++) lanes |= (uint32_t)(values[other] != 0) << other;
  return done(lanes);
}

int32_t ptx_sum(int32_t value) {
  const uint32_t *values = all((uint32_t)value);
  uint32_t sum = 0;
  for (uint32_t other = 0; other < WARP; other++) sum += values[other];
  return done(sum);
}

uint32_t ptx_match(uint32_t value) {
  const uint32_t *values = all(value);
  uint32_t lanes = 0;
  for (uint32_t other = 0; other < WARP; other++) lanes |= (uint32_t)(values[other] == value) << other;
  return done(lanes);
}

uint32_t ptx_shuffle(uint32_t value, uint32_t from) { return done(all(value)[from % WARP]); }

uint32_t ptx_shuffle_up(uint32_t value, uint32_t distance) {
  const uint32_t *values = all(value);
  return done(lane() >= distance ? values[lane() - distance] : value);
}

uint32_t ptx_shuffle_xor(uint32_t value, uint32_t mask) { return done(all(value)[(lane() ^ mask) % WARP]); }

// MARK: Order

void ptx_fence_system(uint32_t system) {
  if (system) atomic_thread_fence(memory_order_seq_cst);
}
void ptx_fence_proxy(void) {}
void ptx_fence_proxy_shared(void) {}

static _Atomic uint64_t *word(uint64_t address) { return (_Atomic uint64_t *)address; }
uint64_t ptx_load_acquire(uint64_t address) { return atomic_load_explicit(word(address), memory_order_acquire); }
uint64_t ptx_load_acquire_gpu(uint64_t address) { return ptx_load_acquire(address); }
uint64_t ptx_load_acquire_peers(uint64_t address, uint32_t system) { return ptx_load_acquire(address); }
void ptx_store_release(uint64_t address, uint64_t value) { atomic_store_explicit(word(address), value, memory_order_release); }
void ptx_store_release_gpu(uint64_t address, uint64_t value) { ptx_store_release(address, value); }
void ptx_store_release_peers(uint64_t address, uint64_t value, uint32_t system) { ptx_store_release(address, value); }
void ptx_prefetch(uint64_t address) { (void)*(volatile uint8_t *)address; }
uint64_t ptx_load_relaxed(uint64_t address) { return atomic_load_explicit(word(address), memory_order_relaxed); }
void ptx_store_relaxed(uint64_t address, uint64_t value) { atomic_store_explicit(word(address), value, memory_order_relaxed); }

static _Atomic uint32_t *number(uint64_t address) { return (_Atomic uint32_t *)address; }
uint32_t ptx_add(uint64_t address, uint32_t value) { return atomic_fetch_add(number(address), value); }
uint32_t ptx_take(uint64_t address) { return ptx_add(address, 1); }
void ptx_add_only(uint64_t address, uint32_t value) { ptx_add(address, value); }

static _Atomic uint32_t *shared(uint32_t offset) { return (_Atomic uint32_t *)(self->block->shared + offset); }
uint32_t ptx_shared_add(uint32_t offset, uint32_t value) { return atomic_fetch_add(shared(offset), value); }

void ptx_no_unroll(void) {}

uint64_t ptx_nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void ptx_start_next(void) {}

// MARK: Bulk copies

static struct phase *phase(uint32_t barrier) { return (struct phase *)(self->block->shared + barrier); }

static void complete_if_all_is_there(struct phase *phase) {
  if (!phase->has_arrived || phase->missing_bytes != 0) return;
  phase->has_arrived = 0;
  phase->parity ^= 1;
}

static void check(uint64_t global, uint32_t offset, uint32_t byte_count) {
  if (global % 16 != 0 || offset % 16 != 0) fault("a bulk copy that is not aligned to 16 bytes");
  if (byte_count == 0 || byte_count % 16 != 0) fault("a bulk copy of no multiple of 16 bytes");
  if (offset + byte_count > self->block->shared_byte_count) fault("a bulk copy beyond shared memory");
}

void ptx_phase_init(uint32_t barrier) {
  pthread_mutex_lock(&self->block->lock);
  *phase(barrier) = (struct phase){.is_there = 1};
  pthread_mutex_unlock(&self->block->lock);
}

void ptx_phase_expect(uint32_t barrier, uint32_t byte_count) {
  pthread_mutex_lock(&self->block->lock);
  struct phase *expecting = phase(barrier);
  if (expecting->is_there != 1) fault("a phase of a barrier that is not there");
  if (expecting->has_arrived) fault("a second arrival in one phase");
  expecting->missing_bytes += (int32_t)byte_count;
  expecting->has_arrived = 1;
  complete_if_all_is_there(expecting);
  pthread_mutex_unlock(&self->block->lock);
}

void ptx_bulk_load(uint32_t to, uint64_t from, uint32_t byte_count, uint32_t barrier) {
  struct block *block = self->block;
  check(from, to, byte_count);
  pthread_mutex_lock(&block->lock);
  if (block->load_count == sizeof block->loads / sizeof block->loads[0]) {
    fault("too many bulk loads at a time");
  } else {
    // Until it is there, the stage has neither what was there nor what comes.
    memset(block->shared + to, 0x5a, byte_count);
    block->loads[block->load_count++] = (struct copy){block->shared + to, (const char *)from, byte_count, barrier};
  }
  pthread_mutex_unlock(&block->lock);
}

void ptx_phase_wait(uint32_t barrier, uint32_t parity) {
  struct block *block = self->block;
  time_t begin = time(NULL);
  while (1) {
    pthread_mutex_lock(&block->lock);
    struct phase *awaited = phase(barrier);
    if (awaited->is_there != 1) fault("a wait for a barrier that is not there");
    uint32_t kept = 0;
    for (uint32_t index = 0; index < block->load_count; index++) {
      struct copy load = block->loads[index];
      if (load.tag != barrier || !awaited->has_arrived) {
        block->loads[kept++] = load;
        continue;
      }
      memcpy(load.to, load.from, load.byte_count);
      awaited->missing_bytes -= (int32_t)load.byte_count;
    }
    block->load_count = kept;
    complete_if_all_is_there(awaited);
    uint32_t is_over = awaited->parity != parity;
    pthread_mutex_unlock(&block->lock);
    if (is_over || atomic_load(&block->fault) != NULL) return;
    if (time(NULL) - begin > 60) return fault("a wait for a phase that nothing ends");
    sched_yield();
  }
}

void ptx_bulk_store(uint64_t to, uint32_t from, uint32_t byte_count) {
  check(to, from, byte_count);
  if (self->store_count == COPIES_MAX) return fault("too many bulk stores at a time");
  self->stores[self->store_count++] = (struct copy){(char *)to, self->block->shared + from, byte_count, self->group};
}

void ptx_bulk_commit(void) { self->group++; }

/// Does what stores of groups before `end` have left to do.
static void store_groups(uint32_t end) {
  uint32_t kept = 0;
  for (uint32_t index = 0; index < self->store_count; index++) {
    struct copy store = self->stores[index];
    if (store.tag < end) {
      memcpy(store.to, store.from, store.byte_count);
    } else {
      self->stores[kept++] = store;
    }
  }
  self->store_count = kept;
}

void ptx_bulk_wait_read_but_one(void) { store_groups(self->group == 0 ? 0 : self->group - 1); }
void ptx_bulk_wait(void) { store_groups(self->group); }

// MARK: Formats

uint32_t ptx_max_pair(uint32_t a, uint32_t b) {
  uint32_t low = (a & 0xffff) > (b & 0xffff) ? a & 0xffff : b & 0xffff;
  uint32_t high = a >> 16 > b >> 16 ? a >> 16 : b >> 16;
  return low | high << 16;
}

uint32_t ptx_max_signed_pair(uint32_t a, uint32_t b) { return ptx_max_pair(a ^ 0x80008000, b ^ 0x80008000) ^ 0x80008000; }

static uint32_t bits(float value) {
  uint32_t result;
  memcpy(&result, &value, sizeof result);
  return result;
}

float ptx_reciprocal(float value) {
  // As far off as it may be.
  uint32_t reciprocal = bits(1 / value) + (bits(value) & 1 ? 1 : -1);
  float result;
  memcpy(&result, &reciprocal, sizeof result);
  return result;
}

static uint32_t bf16(float value) {
  if (value != value) return 0x7fff;
  return (bits(value) + 0x7fff + (bits(value) >> 16 & 1)) >> 16;
}

uint32_t ptx_bf16x2(float low, float high) { return bf16(low) | bf16(high) << 16; }

static uint32_t e4m3(float value) {
  uint32_t sign = bits(value) >> 24 & 0x80, magnitude = bits(value) & 0x7fffffff;
  if (value != value) return 0x7f;
  // To the nearest multiple of what the last digit is worth, 2^-9 for the smallest.
  int32_t exponent = (int32_t)(magnitude >> 23) - 127;
  double digit = 0x1p-9;
  for (int32_t step = -6; step < exponent; step++) digit *= 2;
  double quotient = (value < 0 ? -(double)value : (double)value) / digit;
  if (quotient > 1e6) return sign | 0x7e;
  uint32_t whole = (uint32_t)quotient;
  double rest = quotient - whole;
  if (rest > 0.5 || (rest == 0.5 && whole % 2 == 1)) whole++;
  // Eight digits a binade; a carry moves into the exponent by itself.
  uint32_t code = exponent < -6 ? whole : (uint32_t)(exponent + 6) * 8 + whole;
  return sign | (code > 0x7e ? 0x7e : code);
}

uint32_t ptx_e4m3x2(float low, float high) { return e4m3(low) | e4m3(high) << 8; }
uint32_t ptx_e4m3x4(float a, float b, float c, float d) { return ptx_e4m3x2(a, b) | ptx_e4m3x2(c, d) << 16; }
