// What Linux offers and Swift's Glibc module does not reach, and the inner loops over rows.
//
// The loops are C because only C can compile one function for several instruction sets and choose at run time: the
// package is built for the oldest x86-64 (or any other processor) and still uses AVX2 where it is there.

#ifndef SWIFTEP_CPLATFORM_H
#define SWIFTEP_CPLATFORM_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

// MARK: System calls. Each returns what the system call returns; -1 means errno is set.

/// A memory file that no one else can open: close-on-exec, resizable, never shrinkable once `swiftep_seal_shrink` was
/// called.
int swiftep_memfd_create(const char *name);
int swiftep_seal_shrink(int descriptor);
/// Takes the memory now rather than at the first touch.
int swiftep_populate(void *address, size_t byte_count);
/// Maps pages of a shared memory file that are there: touching them later is no fault.
int swiftep_map_present(void *address, size_t byte_count);
/// Sleeps while `*word == expected`, at most `nanoseconds`. Works between processes.
int swiftep_futex_wait(const void *word, uint32_t expected, uint64_t nanoseconds);
int swiftep_futex_wake(const void *word, int count);

/// Whether a memory file can never shrink: 1 or 0.
int swiftep_seals_shrinking(int descriptor);

/// Cores that this process may run on.
int swiftep_usable_core_count(void);

/// One turn of a spin loop.
static inline void swiftep_relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// MARK: Connections between processes of one host. Descriptors are close-on-exec and do not block.

/// Sockets of whole messages (SOCK_SEQPACKET) with names that are in no file system; at most 107 bytes of the name count.
int swiftep_listen_abstract(const char *name);
int swiftep_connect_abstract(const char *name);
int swiftep_accept(int listener);
/// The user who runs the process at the other end.
int swiftep_peer_user(int descriptor, uint32_t *user);
/// Sends one message; `attachment` is a descriptor that goes with it, or -1.
ssize_t swiftep_send(int descriptor, const void *bytes, size_t byte_count, int attachment);
/// Receives one message and the descriptor that came with it (the caller's to close), or -1. `is_cut`: it was longer than `capacity`.
ssize_t swiftep_receive(int descriptor, void *bytes, size_t capacity, int *attachment, bool *is_cut);
/// Something for `poll` to wake up from: write 8 bytes, a number that is not zero.
int swiftep_make_waker(void);
/// At most 256 bytes that nobody can guess.
int swiftep_random(void *bytes, size_t byte_count);

/// A TCP socket that listens, or that is about to be connected: it can be written to when that has come to an end, and
/// `swiftep_connection_error` is 0 where it has succeeded. `swiftep_accept`, `swiftep_send` and `swiftep_receive` serve these too.
int swiftep_listen_tcp(const struct sockaddr *address, socklen_t length);
int swiftep_connect_tcp(const struct sockaddr *address, socklen_t length);
int swiftep_connection_error(int descriptor);

// MARK: Forks

/// Forked children close the descriptor at once; `swiftep_close_guarded` closes it here. Returns -1 where memory for that is missing.
int swiftep_guard_from_forks(int descriptor);
void swiftep_close_guarded(int descriptor);
/// Another number for the same file, close-on-exec.
int swiftep_duplicate(int descriptor);
/// Two connected stream sockets, close-on-exec.
int swiftep_socket_pair(int *ends);
/// Forked children do not have these pages.
int swiftep_hide_from_forks(void *address, size_t byte_count);
/// Forks a child that runs `body`, on a thread of its own, and exits with its result, at once: nothing that is registered for exit runs. It is killed when the
/// calling thread ends. Returns the child's id, or -1.
pid_t swiftep_fork(int (*body)(void *), void *context);

// MARK: Processes that a launcher starts. For a process's main thread: a child is killed when the thread that has started
// it ends.

struct swiftep_program {
  const char *path;
  /// The first is the program's name; the end is NULL.
  char *const *arguments;
  /// `NAME=value`, beside this process's environment; the end is NULL.
  char *const *variables;
  /// What become the program's descriptors 0, 1 and 2.
  int input, output, errors;
  /// Signals that the program begins with blocked.
  const sigset_t *mask;
  /// What `swiftep_start_keeper` has returned: takes care of the program's process group.
  int keeper;
};

/// Starts a program, in a process group of its own, that is killed when this process ends. -1: errno is what fork or exec
/// has left.
pid_t swiftep_start(const struct swiftep_program *program);
/// Close-on-exec; the end that is used here, 0 for reading or 1 for writing, does not block.
int swiftep_pipe(int descriptors[2], int own_end);

int swiftep_available_byte_count(int descriptor, int *byte_count);

/// Descendants whose parent ends become children of this process.
int swiftep_adopt_orphans(void);

struct swiftep_end {
  pid_t process;
  /// An exit code, or a signal.
  int code;
  bool is_signal, dumped_core;
};

/// Takes the end of a child, or of any child for process 0. 1: there is one; 0: none has ended.
int swiftep_reap(pid_t process, struct swiftep_end *end);
/// Whether no child of this process, be it one that has ended, is in the group.
bool swiftep_group_is_empty(pid_t group);
/// Something to wait for the end of a process with; close-on-exec.
int swiftep_open_process(pid_t process);

/// Starts a process that kills the process groups in its care when this process ends, however it ends. Returns the
/// descriptor for its orders; closing it ends the keeper.
int swiftep_start_keeper(int group_count_max, pid_t *process);
/// A group to take care of, or minus one to forget.
bool swiftep_order(int keeper, pid_t order);

/// From now on signals are to be read (`swiftep_next_signal`, 0: none is there) from the descriptor that this returns;
/// those that are ignored stay so. `before` is what was blocked till then.
int swiftep_take_signals(const int *signals, int count, sigset_t *before);
int swiftep_next_signal(int descriptor);

/// Waits for many descriptors at once; what became ready first is reported first.
int swiftep_make_watch(void);
int swiftep_watch(int watch, int descriptor, bool for_writing, uint64_t key);
int swiftep_unwatch(int watch, int descriptor);
/// The keys of what is ready; waits at most `milliseconds`, -1: without an end.
int swiftep_await_ready(int watch, uint64_t *keys, int capacity, int milliseconds);

// MARK: What the system allows, tried

/// Forks a child that does nothing until it is killed; it has all descriptors that this process has.
pid_t swiftep_start_sleeper(void);

enum { SWIFTEP_GPU_COUNT_MAX = 16 };

struct swiftep_gpu {
  char name[96];
  size_t byte_count;
  /// Bit i: it does not reach the memory of device i.
  uint32_t unreached;
};

struct swiftep_gpu_driver {
  bool is_library_there;
  /// As 12040 for 12.4.
  int version;
  int device_count;
  struct swiftep_gpu devices[SWIFTEP_GPU_COUNT_MAX];
  /// What is wrong; empty where nothing is.
  char refusal[256];
};

/// Loads the GPU driver, in a process of its own: it may crash or never return. -1, ETIMEDOUT: it did not answer in time;
/// ECHILD: it crashed.
int swiftep_ask_gpu_driver(struct swiftep_gpu_driver *driver, int milliseconds);

// MARK: Rows

enum swiftep_format { SWIFTEP_BF16 = 1, SWIFTEP_FP16 = 2, SWIFTEP_FP32 = 3, SWIFTEP_CODED_BF16 = 6 };

/// Copies `byte_count` bytes, a multiple of 16, to each destination (16-byte aligned). Streaming stores go around the
/// caches: end the batch with `swiftep_store_fence`.
void swiftep_scatter(void *const *destinations, int destination_count, const void *source, size_t byte_count, bool streaming);

/// Orders earlier streaming stores before later stores.
void swiftep_store_fence(void);

/// Quantizes `channel_count` BF16 channels, a multiple of 16, to FP8 E4M3 (round to nearest even, saturating), in blocks of 128 channels:
/// `inverse * x` with `inverse = 448 / amax` and `scale = amax / 448`, amax clamped from below at 1e-4. With
/// `power_of_two`, the scale is rounded up to a power of two and stored as its biased exponent, one byte a block;
/// otherwise as a Float.
void swiftep_quantize_e4m3(uint8_t *values, void *scales, const uint16_t *source, size_t channel_count, bool power_of_two);

/// Quantizes `channel_count` BF16 channels, a multiple of 64, to NVFP4, in blocks of 16 channels. A block's scale is
/// `amax / 6 * global_scale` as E4M3; an element is `|x| * (global_scale / scale)` as E2M1 with the channel's sign, the even
/// channel's in the low four bits of a byte. Both are rounded to nearest even and saturate. Where the scale is zero, the
/// elements are. A block with an infinity or NaN has the scale NaN (0x7f), and elements of 6. The global scale is 2^-118 to
/// 2^118.
void swiftep_quantize_nvfp4(uint8_t *values, uint8_t *scales, const uint16_t *source, size_t channel_count, float global_scale);

/// Codes a BF16 row, a multiple of 128 channels, as LogFMT; see `EPKernels.LogFMT`. Blocks that are sent as they are go to their
/// places in `exact`, which may be `source`.
void swiftep_encode_logfmt(void *records, void *exact, const void *source, size_t channel_count);

struct swiftep_reduction {
  int format;
  int row_count;
  const void *const *rows;
  /// Of LogFMT rows, whose `rows` are their records: where the blocks lie that are sent as they are. Output and biases are BF16.
  const void *const *exact;
  /// NULL: every weight is one, and nothing is multiplied.
  const float *weights;
  /// NULL where absent.
  const void *bias0, *bias1;
};

/// `output[i] = round(0 + w0 * rows[0][i] + w1 * rows[1][i] + ... + bias0[i] + bias1[i])`, each operation rounded in
/// Float, in this order. Of LogFMT rows, `first` and `element_count` are multiples of 16.
void swiftep_reduce(void *output, const struct swiftep_reduction *reduction, size_t first, size_t element_count, bool streaming);

#endif
