#define _GNU_SOURCE
#include "CPlatform.h"

#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

pid_t swiftep_start_sleeper(void) {
  pid_t parent = getpid();
  pid_t child = fork();
  if (child != 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  while (getppid() == parent) pause();
  _exit(0);
}

// MARK: The GPU driver

typedef int (*initialize)(unsigned);
typedef int (*get_integer)(int *);
typedef int (*get_device)(int *, int);
typedef int (*get_name)(char *, int, int);
typedef int (*get_memory)(size_t *, int);
typedef int (*get_access)(int *, int, int);

static void ask_driver(struct swiftep_gpu_driver *driver) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    const char *why = dlerror();
    snprintf(driver->refusal, sizeof driver->refusal, "%s", why == NULL ? "libcuda.so.1: not there" : why);
    return;
  }
  driver->is_library_there = true;
  initialize cuInit = (initialize)dlsym(library, "cuInit");
  get_integer cuDriverGetVersion = (get_integer)dlsym(library, "cuDriverGetVersion");
  get_integer cuDeviceGetCount = (get_integer)dlsym(library, "cuDeviceGetCount");
  get_device cuDeviceGet = (get_device)dlsym(library, "cuDeviceGet");
  get_name cuDeviceGetName = (get_name)dlsym(library, "cuDeviceGetName");
  get_memory cuDeviceTotalMem = (get_memory)dlsym(library, "cuDeviceTotalMem_v2");
  get_access cuDeviceCanAccessPeer = (get_access)dlsym(library, "cuDeviceCanAccessPeer");
  if (!cuInit || !cuDriverGetVersion || !cuDeviceGetCount || !cuDeviceGet || !cuDeviceGetName || !cuDeviceTotalMem ||
      !cuDeviceCanAccessPeer) {
    snprintf(driver->refusal, sizeof driver->refusal, "libcuda.so.1 lacks functions of a CUDA driver");
    return;
  }
  cuDriverGetVersion(&driver->version);
  int code = cuInit(0);
  if (code == 0) code = cuDeviceGetCount(&driver->device_count);
  if (code != 0) {
    const char *name = "an unknown error";
    int (*cuGetErrorName)(int, const char **) = (int (*)(int, const char **))dlsym(library, "cuGetErrorName");
    if (cuGetErrorName != NULL) cuGetErrorName(code, &name);
    snprintf(driver->refusal, sizeof driver->refusal, "cuInit: %s (%d)", name == NULL ? "an unknown error" : name, code);
    return;
  }
  for (int index = 0; index < driver->device_count && index < SWIFTEP_GPU_COUNT_MAX; index++) {
    int device;
    if (cuDeviceGet(&device, index) != 0) continue;
    cuDeviceGetName(driver->devices[index].name, sizeof driver->devices[index].name, device);
    cuDeviceTotalMem(&driver->devices[index].byte_count, device);
    for (int other = 0; other < driver->device_count && other < SWIFTEP_GPU_COUNT_MAX; other++) {
      int peer, reaches = 0;
      if (other == index || cuDeviceGet(&peer, other) != 0) continue;
      if (cuDeviceCanAccessPeer(&reaches, device, peer) != 0 || !reaches) {
        driver->devices[index].unreached |= 1u << other;
      }
    }
  }
}

int swiftep_ask_gpu_driver(struct swiftep_gpu_driver *driver, int milliseconds) {
  memset(driver, 0, sizeof *driver);
  int ends[2];
  if (swiftep_pipe(ends, 0) < 0) return -1;
  pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    ask_driver(driver);
    _exit(write(ends[1], driver, sizeof *driver) == (ssize_t)sizeof *driver ? 0 : 1);
  }
  int code = errno;
  close(ends[1]);
  if (child < 0) {
    close(ends[0]);
    errno = code;
    return -1;
  }
  struct pollfd answer = {.fd = ends[0], .events = POLLIN};
  int ready = poll(&answer, 1, milliseconds);
  // It fits into a pipe as a whole.
  bool is_answered = ready == 1 && read(ends[0], driver, sizeof *driver) == (ssize_t)sizeof *driver;
  close(ends[0]);
  kill(child, SIGKILL);
  // A process that a broken driver holds back ends when the driver lets it.
  for (int attempt = 0; attempt < 200 && waitpid(child, NULL, WNOHANG) == 0; attempt++) usleep(5000);
  if (is_answered) return 0;
  errno = ready == 0 ? ETIMEDOUT : ECHILD;
  return -1;
}
