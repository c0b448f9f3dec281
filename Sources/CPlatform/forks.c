#define _GNU_SOURCE
#include "CPlatform.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

// MARK: What forked children must not keep

// Descriptors, one more than each; zero: a free entry. An open copy of a control connection would hide its owner's death. No fork
// happens while the list changes, so that a child closes exactly what was open.
static pthread_mutex_t guarded_lock = PTHREAD_MUTEX_INITIALIZER;
static int *guarded;
static int guarded_capacity;

static void lock_guarded(void) { pthread_mutex_lock(&guarded_lock); }

static void unlock_guarded(void) { pthread_mutex_unlock(&guarded_lock); }

// MARK: What Swift's runtime must not keep

// The runtime remembers for each thread its kernel id, which is another one in a forked child: with the old one, locks that two threads want
// are never given back, and both spin for ever (`swift::threading_impl::linux::ulock_get_tid`, which has no name to call it by). What the
// runtime keeps for the thread that forks is therefore searched for its id before, and a child forgets that.
enum { remembered_max = 8 };
static uint32_t *remembered[remembered_max];

// Of the runtime, whether it is a library or part of this one.
extern void swift_once(void *, void *, void *);

static int find_remembered(struct dl_phdr_info *module, size_t size, void *count) {
  (void)size;
  uintptr_t code = (uintptr_t)swift_once;
  size_t own_byte_count = 0;
  int has_runtime = 0;
  for (int index = 0; index < module->dlpi_phnum; index++) {
    const ElfW(Phdr) *segment = &module->dlpi_phdr[index];
    uintptr_t begin = module->dlpi_addr + segment->p_vaddr;
    if (segment->p_type == PT_LOAD) has_runtime |= code >= begin && code < begin + segment->p_memsz;
    if (segment->p_type == PT_TLS) own_byte_count = segment->p_memsz;
  }
  if (!has_runtime) return 0;
  uint32_t *words = module->dlpi_tls_data, id = (uint32_t)syscall(SYS_gettid);
  for (size_t index = 0; words != NULL && index < own_byte_count / sizeof *words; index++) {
    if (words[index] == id && *(int *)count < remembered_max) remembered[(*(int *)count)++] = &words[index];
  }
  return 1;
}

static void prepare(void) {
  lock_guarded();
  int count = 0;
  dl_iterate_phdr(find_remembered, &count);
  if (count < remembered_max) remembered[count] = NULL;
}

static void forget(void) {
  for (int index = 0; index < remembered_max && remembered[index] != NULL; index++) *remembered[index] = 0;
}

static void close_guarded(void) {
  forget();
  for (int index = 0; index < guarded_capacity; index++) {
    if (guarded[index] > 0) close(guarded[index] - 1);
    guarded[index] = 0;
  }
  unlock_guarded();
}

__attribute__((constructor)) static void install(void) { pthread_atfork(prepare, unlock_guarded, close_guarded); }

static int find_guarded(int entry) {
  for (int index = 0; index < guarded_capacity; index++) {
    if (guarded[index] == entry) return index;
  }
  return -1;
}

int swiftep_guard_from_forks(int descriptor) {
  lock_guarded();
  int index = find_guarded(0);
  if (index < 0) {
    int capacity = guarded_capacity == 0 ? 64 : 2 * guarded_capacity;
    int *larger = realloc(guarded, (size_t)capacity * sizeof *guarded);
    if (larger != NULL) {
      index = guarded_capacity;
      for (int added = guarded_capacity; added < capacity; added++) larger[added] = 0;
      guarded = larger;
      guarded_capacity = capacity;
    }
  }
  if (index >= 0) guarded[index] = descriptor + 1;
  unlock_guarded();
  return index >= 0 ? 0 : -1;
}

void swiftep_close_guarded(int descriptor) {
  lock_guarded();
  int index = find_guarded(descriptor + 1);
  // In a forked child, the descriptor is closed already, and its number may be another's.
  if (index >= 0) {
    guarded[index] = 0;
    close(descriptor);
  }
  unlock_guarded();
}

int swiftep_hide_from_forks(void *address, size_t byte_count) { return madvise(address, byte_count, MADV_DONTFORK); }

// MARK: Forking

int swiftep_duplicate(int descriptor) { return fcntl(descriptor, F_DUPFD_CLOEXEC, 0); }

int swiftep_socket_pair(int *ends) { return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends); }

struct child {
  int (*body)(void *);
  void *context;
};

static void *run_child(void *argument) {
  struct child *child = argument;
  _exit(child->body(child->context));
}

pid_t swiftep_fork(int (*body)(void *), void *context) {
  pid_t parent = getpid();
  pid_t id = fork();
  if (id != 0) return id;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // The parent may have gone before that.
  if (getppid() != parent) _exit(127);
  // Other libraries in Swift, each of which remembers its threads' ids for its own locks, know nothing of forks. A new thread has no id
  // remembered.
  struct child child = {.body = body, .context = context};
  pthread_t thread;
  if (pthread_create(&thread, NULL, run_child, &child) == 0) pthread_join(thread, NULL);
  _exit(127);
}
