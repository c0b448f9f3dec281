#define Py_LIMITED_API 0x03090000
#include <Python.h>

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "private.h"

struct swiftep_py_owner {
  atomic_long use_count;
  uint64_t key;
  struct swiftep_py_owner *next;
};

/// Owners without a use, the last one first.
static _Atomic(swiftep_py_owner *) unused;
/// Threads that may call Python.
static atomic_int calling_count;
static atomic_int is_stopped;

/// Of the package: forgets what is registered under keys without a use.
extern void swiftep_py_drain(void);

static int drain(void *context) {
  (void)context;
  swiftep_py_drain();
  return 0;
}

swiftep_py_owner *swiftep_py_owner_create(uint64_t key) {
  swiftep_py_owner *owner = malloc(sizeof *owner);
  if (owner == NULL) return NULL;
  atomic_init(&owner->use_count, 1);
  owner->key = key;
  owner->next = NULL;
  return owner;
}

void swiftep_py_owner_retain(void *owner) {
  atomic_fetch_add_explicit(&((swiftep_py_owner *)owner)->use_count, 1, memory_order_relaxed);
}

void swiftep_py_owner_release(void *pointer) {
  swiftep_py_owner *owner = pointer;
  if (atomic_fetch_sub_explicit(&owner->use_count, 1, memory_order_acq_rel) != 1) return;
  swiftep_py_owner *first = atomic_load(&unused);
  do owner->next = first;
  while (!atomic_compare_exchange_weak(&unused, &first, owner));
  // The library's threads neither wait for the interpreter's lock nor run what objects do when they end: the interpreter is
  // asked to. Where it cannot be, the next call of the package does it.
  if (first != NULL) return;
  atomic_fetch_add(&calling_count, 1);
  if (!atomic_load(&is_stopped)) Py_AddPendingCall(drain, NULL);
  atomic_fetch_sub(&calling_count, 1);
}

/// Taken one at a time, with the interpreter's lock not held: a stack that only one thread pops from needs nothing else.
static atomic_flag is_popping = ATOMIC_FLAG_INIT;

uint64_t swiftep_py_next_unused(void) {
  if (atomic_load(&unused) == NULL) return 0;
  while (atomic_flag_test_and_set(&is_popping)) sched_yield();
  swiftep_py_owner *first = atomic_load(&unused);
  while (first != NULL && !atomic_compare_exchange_weak(&unused, &first, first->next)) {}
  atomic_flag_clear(&is_popping);
  if (first == NULL) return 0;
  uint64_t key = first->key;
  free(first);
  return key;
}

void swiftep_py_stop(void) {
  atomic_store(&is_stopped, 1);
  while (atomic_load(&calling_count) != 0) sched_yield();
}
