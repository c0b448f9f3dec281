#define _GNU_SOURCE
#include "CPlatform.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

bool swiftep_order(int keeper, pid_t order) { return write(keeper, &order, sizeof order) == sizeof order; }

// MARK: Starting

extern char **environ;

static int close_failing(int first, int second, int code) {
  close(first);
  close(second);
  errno = code;
  return -1;
}

/// `sh path argument...`: what shells do with a script that does not say what runs it.
static char **script_arguments(const struct swiftep_program *program) {
  size_t count = 0;
  while (program->arguments[count] != NULL) count++;
  char **arguments = calloc(count + 2, sizeof *arguments);
  if (arguments == NULL) return NULL;
  arguments[0] = (char *)"sh";
  arguments[1] = (char *)program->path;
  for (size_t index = 1; index < count; index++) arguments[index + 1] = program->arguments[index];
  return arguments;
}

/// The environment, but for what `variables` (`NAME=value`) say.
static char **changed_environment(char *const *variables) {
  size_t count = 0, change_count = 0;
  while (environ[count] != NULL) count++;
  while (variables[change_count] != NULL) change_count++;
  char **changed = calloc(count + change_count + 1, sizeof *changed);
  if (changed == NULL) return NULL;
  size_t kept = 0;
  for (size_t index = 0; index < count; index++) {
    bool is_changed = false;
    for (size_t change = 0; change < change_count && !is_changed; change++) {
      size_t name_length = strcspn(variables[change], "=") + 1;
      is_changed = strncmp(environ[index], variables[change], name_length) == 0;
    }
    if (!is_changed) changed[kept++] = environ[index];
  }
  memcpy(changed + kept, variables, change_count * sizeof *changed);
  return changed;
}

/// After a fork: nothing but system calls until exec. Writes errno to `report` if it comes to that.
static _Noreturn void become(
    const struct swiftep_program *program, char **environment, char **script, pid_t parent, int report) {
  setpgid(0, 0);
  // Asked for before the parent is looked at: it ends before the one or after the other.
  if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0) goto failed;
  if (getppid() != parent) _exit(127);
  const int descriptors[] = {program->input, program->output, program->errors};
  for (int standard = 0; standard < 3; standard++) {
    if (descriptors[standard] != standard && dup2(descriptors[standard], standard) < 0) goto failed;
  }
  // Before it can start anything that would have to be killed.
  if (!swiftep_order(program->keeper, getpid())) goto failed;
  sigprocmask(SIG_SETMASK, program->mask, NULL);
  execve(program->path, program->arguments, environment);
  if (errno == ENOEXEC) execve("/bin/sh", script, environment);
failed:;
  int code = errno;
  if (write(report, &code, sizeof code) < 0) _exit(126);
  _exit(127);
}

pid_t swiftep_start(const struct swiftep_program *program) {
  int report[2];
  if (pipe2(report, O_CLOEXEC) < 0) return -1;
  char **environment = changed_environment(program->variables);
  char **script = script_arguments(program);
  pid_t parent = getpid();
  errno = ENOMEM;
  pid_t child = environment != NULL && script != NULL ? fork() : -1;
  if (child == 0) become(program, environment, script, parent, report[1]);
  int fork_code = errno;
  free(environment);
  free(script);
  if (child < 0) return close_failing(report[0], report[1], fork_code);
  // Here as well as there: it is done when either goes on.
  setpgid(child, child);
  close(report[1]);
  int code = 0;
  ssize_t count;
  do count = read(report[0], &code, sizeof code);
  while (count < 0 && errno == EINTR);
  close(report[0]);
  if (count != sizeof code) return child;
  swiftep_order(program->keeper, -child);
  while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {}
  errno = code;
  return -1;
}

int swiftep_pipe(int descriptors[2], int own_end) {
  if (pipe2(descriptors, O_CLOEXEC) < 0) return -1;
  // The other end's owner expects it to block.
  return fcntl(descriptors[own_end], F_SETFL, O_NONBLOCK);
}

int swiftep_available_byte_count(int descriptor, int *byte_count) { return ioctl(descriptor, FIONREAD, byte_count); }

// MARK: Ending

int swiftep_adopt_orphans(void) { return prctl(PR_SET_CHILD_SUBREAPER, 1); }

int swiftep_reap(pid_t process, struct swiftep_end *end) {
  siginfo_t info = {.si_pid = 0};
  int result;
  do result = waitid(process == 0 ? P_ALL : P_PID, (id_t)process, &info, WEXITED | WNOHANG);
  while (result < 0 && errno == EINTR);
  if (result < 0 || info.si_pid == 0) return result;
  end->process = info.si_pid;
  end->code = info.si_status;
  end->is_signal = info.si_code != CLD_EXITED;
  end->dumped_core = info.si_code == CLD_DUMPED;
  return 1;
}

bool swiftep_group_is_empty(pid_t group) {
  siginfo_t info;
  return waitid(P_PGID, (id_t)group, &info, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD;
}

int swiftep_open_process(pid_t process) {
#ifdef SYS_pidfd_open
  return (int)syscall(SYS_pidfd_open, process, 0);
#else
  errno = ENOSYS;
  return -1;
#endif
}

/// The keeper's descriptor 0 is what it listens to.
static void close_all_but_the_first(void) {
#ifdef SYS_close_range
  if (syscall(SYS_close_range, 1u, ~0u, 0u) == 0) return;
#endif
  long count = sysconf(_SC_OPEN_MAX);
  for (int descriptor = 1; descriptor < count; descriptor++) close(descriptor);
}

static _Noreturn void keep(int orders, pid_t *groups, int capacity) {
  // A session of its own: what ends a terminal's processes does not end it.
  setsid();
  prctl(PR_SET_NAME, "swiftep-keeper");
  if (dup2(orders, 0) < 0) _exit(1);
  close_all_but_the_first();
  int count = 0;
  while (true) {
    pid_t order;
    ssize_t size = read(0, &order, sizeof order);
    if (size < 0 && errno == EINTR) continue;
    if (size != sizeof order) break;
    if (order > 0 && count < capacity) groups[count++] = order;
    for (int index = 0; order < 0 && index < count; index++) {
      if (groups[index] == -order) groups[index--] = groups[--count];
    }
  }
  for (int index = 0; index < count; index++) kill(-groups[index], SIGKILL);
  _exit(0);
}

int swiftep_start_keeper(int group_count_max, pid_t *process) {
  size_t byte_count = (size_t)group_count_max * sizeof(pid_t);
  pid_t *groups = mmap(NULL, byte_count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (groups == MAP_FAILED) return -1;
  int orders[2];
  if (pipe2(orders, O_CLOEXEC) < 0) {
    munmap(groups, byte_count);
    return -1;
  }
  // It is not to be ended by a signal that comes before it has looked around.
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, &before);
  *process = fork();
  int code = errno;
  if (*process == 0) {
    close(orders[1]);
    keep(orders[0], groups, group_count_max);
  }
  sigprocmask(SIG_SETMASK, &before, NULL);
  munmap(groups, byte_count);
  close(orders[0]);
  if (*process > 0) return orders[1];
  close(orders[1]);
  errno = code;
  return -1;
}

// MARK: Waiting

int swiftep_take_signals(const int *signals, int count, sigset_t *before) {
  sigset_t taken;
  sigemptyset(&taken);
  for (int index = 0; index < count; index++) {
    struct sigaction action;
    if (sigaction(signals[index], NULL, &action) < 0) return -1;
    if (signals[index] == SIGCHLD) {
      // Who ignores it has its children taken away before they can be waited for.
      action = (struct sigaction){.sa_handler = SIG_DFL};
      if (sigaction(SIGCHLD, &action, NULL) < 0) return -1;
    } else if (action.sa_handler == SIG_IGN) {
      continue;
    }
    sigaddset(&taken, signals[index]);
  }
  if (sigprocmask(SIG_BLOCK, &taken, before) < 0) return -1;
  return signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
}

int swiftep_next_signal(int descriptor) {
  struct signalfd_siginfo info;
  return read(descriptor, &info, sizeof info) == sizeof info ? (int)info.ssi_signo : 0;
}

int swiftep_make_watch(void) { return epoll_create1(EPOLL_CLOEXEC); }

int swiftep_watch(int watch, int descriptor, bool for_writing, uint64_t key) {
  struct epoll_event event = {.events = for_writing ? EPOLLOUT : EPOLLIN, .data.u64 = key};
  return epoll_ctl(watch, EPOLL_CTL_ADD, descriptor, &event);
}

int swiftep_unwatch(int watch, int descriptor) { return epoll_ctl(watch, EPOLL_CTL_DEL, descriptor, NULL); }

int swiftep_await_ready(int watch, uint64_t *keys, int capacity, int milliseconds) {
  enum { count_max = 64 };
  struct epoll_event events[count_max];
  int count = epoll_wait(watch, events, capacity < count_max ? capacity : count_max, milliseconds);
  for (int index = 0; index < count; index++) keys[index] = events[index].data.u64;
  return count;
}
