#define _GNU_SOURCE
#include "CPlatform.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
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

static void close_guarded(void) {
  for (int index = 0; index < guarded_capacity; index++) {
    if (guarded[index] > 0) close(guarded[index] - 1);
    guarded[index] = 0;
  }
  unlock_guarded();
}

static void install(void) { pthread_atfork(lock_guarded, unlock_guarded, close_guarded); }

static int find_guarded(int entry) {
  for (int index = 0; index < guarded_capacity; index++) {
    if (guarded[index] == entry) return index;
  }
  return -1;
}

int swiftep_guard_from_forks(int descriptor) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, install);
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
  // Swift's runtime remembers for each thread its kernel id, which is another one here; with it, locks that two threads want are never
  // given back. A new thread has none remembered.
  struct child child = {.body = body, .context = context};
  pthread_t thread;
  if (pthread_create(&thread, NULL, run_child, &child) == 0) pthread_join(thread, NULL);
  _exit(127);
}
