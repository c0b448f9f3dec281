#define _GNU_SOURCE
#include "CPlatform.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

int swiftep_memfd_create(const char *name) { return memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING); }

int swiftep_seal_shrink(int descriptor) { return fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK); }

int swiftep_populate(void *address, size_t byte_count) {
  if (madvise(address, byte_count, MADV_POPULATE_WRITE) == 0) return 0;
  // Kernels before 5.14 do not know it; there, pages are taken at the first touch.
  return errno == EINVAL ? 0 : -1;
}

int swiftep_map_present(void *address, size_t byte_count) { return madvise(address, byte_count, MADV_POPULATE_READ); }

int swiftep_futex_wait(const void *word, uint32_t expected, uint64_t nanoseconds) {
  struct timespec timeout = {.tv_sec = (time_t)(nanoseconds / 1000000000u), .tv_nsec = (long)(nanoseconds % 1000000000u)};
  return (int)syscall(SYS_futex, word, FUTEX_WAIT, expected, &timeout, NULL, 0);
}

int swiftep_futex_wake(const void *word, int count) { return (int)syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0); }

int swiftep_usable_core_count(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}
