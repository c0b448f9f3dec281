/// SwiftEP: expert-parallel communication for Mixture-of-Experts models.
///
/// Tokens go to the ranks that hold their experts (dispatch), and what comes back is summed (combine). `libswiftep.so`
/// needs nothing but glibc 2.34 or later, libstdc++ and libgcc_s, and for GPUs the driver.
///
/// Conventions
/// - A struct begins with its size, which the caller sets to `sizeof` before it passes one, to be read or to be filled: a
///   library that is newer knows what the caller's does not have. All else of a struct that is zero means the default.
/// - A function that can fail returns a code, and stores where the last parameter points, unless that is NULL, NULL or an
///   error that the caller frees (`swiftep_error_free`). What it was to make is then NULL.
/// - What a `*_create` or `swiftep_*` function stores through a `**` belongs to the caller, who gives it back with that
///   type's `*_free`; NULL is allowed there. Objects keep alive what they need: they can be freed in any order.
/// - "Collective": all ranks call it, in the same order, each from a thread or process of its own. A call that one rank makes
///   with arguments that cannot be used fails on all ranks with the same error, and they can go on. (What is no argument at
///   all fails on the caller's alone: NULL for an object that a call has to have, a struct's size, a count without an array.)
/// - Threads: every function may be called from any thread. Calls on one buffer run one at a time, further ones wait.
/// - Nothing here ends the process or waits without an end: no signal handler, no trap. (Who waits for an event of its own
///   that nobody completes, waits.)
/// - A process may be forked at any time. What it has belongs to the parent; the child makes its own.
///
/// What the operations do is said at `ExpertBuffer` and `Communicator` in the documentation of the Swift library, which
/// this is all of.
#ifndef SWIFTEP_H
#define SWIFTEP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// MARK: Errors

typedef int32_t swiftep_code;

enum {
  SWIFTEP_OK = 0,
  /// An argument cannot be used; `rank` is the rank that passed it.
  SWIFTEP_INVALID_ARGUMENT = 1,
  /// The ranks made calls that do not belong together: `expected` is what rank 0 passed, `found` what `rank` did.
  SWIFTEP_RANKS_DISAGREE = 2,
  /// `rank` did not reach `step`. The buffer is lost. All ranks that are left name the same one.
  SWIFTEP_RANK_MISSING = 3,
  /// The arena of `rank` can hold no more, or a buffer does not fit.
  SWIFTEP_OUT_OF_MEMORY = 4,
  /// An earlier operation of this buffer has failed for `cause`; the buffer can only be closed.
  SWIFTEP_BUFFER_LOST = 5,
  /// Of checked kernels: a kernel of `rank` would have gone astray.
  SWIFTEP_CHECK_FAILED = 6,
  /// Another rank goes on without `rank`, which is the caller's own (`swiftep_buffer_unmask`).
  SWIFTEP_RANK_MASKED = 7,
  SWIFTEP_BUFFER_CLOSED = 8,
  /// The ranks could not find each other.
  SWIFTEP_RENDEZVOUS_FAILED = 9,
  /// The system refused `rank` a call; `system_code` is its errno.
  SWIFTEP_SYSTEM_CALL = 10,
  /// The NVIDIA driver refused `rank` a call; `system_code` is its code.
  SWIFTEP_DRIVER = 11,
  /// The machine that was asked for is not here, or cannot do what was asked.
  SWIFTEP_MACHINE_UNAVAILABLE = 12,
};

/// What went wrong. Belongs to whoever called; its texts, UTF-8, are there as long as it is.
typedef struct swiftep_error {
  size_t size;
  swiftep_code code;
  /// At fault; -1 where no rank is involved.
  int32_t rank;
  /// One line.
  const char *message;
  /// NULL unless the code has it: of `INVALID_ARGUMENT`; of `RANKS_DISAGREE` and `CHECK_FAILED` what it is about.
  const char *argument, *expected, *found;
  /// NULL unless `RANK_MISSING`: "setup", "regrouping", "input", "exchange" or "completion"; or `CHECK_FAILED`.
  const char *step;
  int64_t needed_byte_count, available_byte_count;
  int32_t system_code;
  /// Of `RANK_MASKED`: who goes on without `rank`; otherwise -1.
  int32_t masking_rank;
  /// Of `BUFFER_LOST`; belongs to this error.
  const struct swiftep_error *cause;
} swiftep_error;

void swiftep_error_free(swiftep_error *error);

/// The library's version, "major.minor.patch"; a constant.
const char *swiftep_version(void);

// MARK: Tensors

/// Element types.
enum {
  SWIFTEP_BF16 = 1,
  SWIFTEP_FP16 = 2,
  SWIFTEP_FP32 = 3,
  /// OCP FP8 E4M3: no infinities, the largest finite value is 448.
  SWIFTEP_FP8_E4M3 = 4,
  /// Two OCP FP4 E2M1 in a byte, the even channel in the low four bits: one element is two channels.
  SWIFTEP_FP4_E2M1_X2 = 5,
  SWIFTEP_UINT8 = 6,
  SWIFTEP_INT32 = 7,
  SWIFTEP_INT64 = 8,
};

/// Where memory lies, or what a buffer's operations run on.
enum {
  /// This host's memory, its cores.
  SWIFTEP_CPU = 0,
  /// An NVIDIA GPU, by its index among those that the driver shows.
  SWIFTEP_CUDA = 1,
};

/// A dense row-major array.
///
/// Given to the library: `data` and what it points to stay valid until the operation's event is complete. If `retain` is
/// not NULL, the library calls `retain(owner)` before it returns from a call that still uses the memory behind it, and
/// `release(owner)` when it does no more, on any thread. A caller that waits for each call needs neither.
///
/// Given by the library: it is the arena's own memory, without a copy, and stays as it is until the caller calls
/// `swiftep_tensor_release`, once for each that a function has stored. `retain` and `release` are not NULL then, and
/// `shape` is valid as long.
typedef struct swiftep_tensor {
  size_t size;
  /// An address of this process, or of its GPU (`CUdeviceptr`, of the primary context), there a multiple of 16.
  void *data;
  int32_t dtype;
  int32_t device_type, device_index;
  int32_t dimension_count;
  const int64_t *shape;
  /// In elements; NULL: row after row without gaps. Only scales may have others, see there; elsewhere they are refused as any other argument is.
  const int64_t *strides;
  void *owner;
  void (*retain)(void *owner);
  void (*release)(void *owner);
} swiftep_tensor;

/// Lets go of a tensor that the library has given, and clears the struct. Of one without `release`, nothing happens.
void swiftep_tensor_release(swiftep_tensor *tensor);

/// The stream uses memory that the library has given: once it is released, it is used again only behind what the stream has
/// been told to do by then. While a graph is captured on the stream, the graph keeps the memory.
///
/// Fails with `INVALID_ARGUMENT` of a tensor that the library has not given, `DRIVER`.
swiftep_code swiftep_tensor_note_use(const swiftep_tensor *tensor, void *stream, swiftep_error **error);

// MARK: Communicators

/// A rank's membership in a group of ranks.
typedef struct swiftep_communicator swiftep_communicator;

/// The caller's way of telling bytes to all ranks: copies what each rank passed to `all`, in rank order, and returns 0;
/// anything else where it fails. `byte_count` is the same on all ranks, 1028 bytes. Called on the thread of the call that it
/// is passed to. What it passes is a secret of the ranks'.
typedef int32_t (*swiftep_all_gather)(void *context, const void *bytes, size_t byte_count, void *all);

/// Timeouts are in nanoseconds; 0: 100 seconds.
typedef int64_t swiftep_nanoseconds;

/// Ranks that are threads of this process: stores `rank_count` of them. Each is to be used from a thread of its own.
swiftep_code swiftep_communicators_of_threads(
  int32_t rank_count, swiftep_communicator **communicators, swiftep_error **error);

/// Ranks that are processes of this host, this one being `rank`. Collective.
swiftep_code swiftep_communicator_of_processes(
  int32_t rank, int32_t rank_count, swiftep_nanoseconds timeout, swiftep_all_gather all_gather, void *context,
  swiftep_communicator **communicator, swiftep_error **error);

/// Ranks that find each other by what their launcher has set in the environment. Collective. See `docs/rendezvous.md`.
swiftep_code swiftep_communicator_from_environment(
  swiftep_nanoseconds timeout, swiftep_communicator **communicator, swiftep_error **error);

/// Where the processes of a job meet.
typedef struct swiftep_meeting_point {
  size_t size;
  /// A secret that they share, 16 to 1024 bytes of UTF-8: what `swiftep token` prints.
  const char *token;
  /// `host:port`, where the lowest rank listens; NULL: on the loopback address.
  const char *address;
  /// Keeps jobs apart that have the same token and no address; NULL: "".
  const char *job;
} swiftep_meeting_point;

/// Ranks that are processes of this host, this one being `rank`, which meet at `point`. Collective.
swiftep_code swiftep_communicator_at(
  const swiftep_meeting_point *point, int32_t rank, int32_t rank_count, swiftep_nanoseconds timeout,
  swiftep_communicator **communicator, swiftep_error **error);

/// The ranks that are still there, in the same order, counted anew. Collective over those. Fails with `RANK_MISSING` and the
/// caller's own rank where the others go on without it.
swiftep_code swiftep_communicator_shrink(
  const swiftep_communicator *communicator, swiftep_nanoseconds timeout, swiftep_communicator **next,
  swiftep_error **error);

/// As `shrink`, and a process that joins becomes the last rank. Collective.
///
/// `all_gather` is called on the lowest rank only, as the first of two; NULL: they meet where the job was started.
/// `refusal`, unless NULL, is given an error that the caller frees, or NULL: why nobody new is in `next`.
swiftep_code swiftep_communicator_admit(
  const swiftep_communicator *communicator, swiftep_nanoseconds timeout, swiftep_all_gather all_gather, void *context,
  swiftep_communicator **next, swiftep_error **refusal, swiftep_error **error);

/// Becomes the last rank of a group whose ranks call `admit`; `all_gather` is called once, as the second of two.
swiftep_code swiftep_communicator_join(
  swiftep_nanoseconds timeout, swiftep_all_gather all_gather, void *context, swiftep_communicator **communicator,
  swiftep_error **error);

/// Becomes the last rank of a group that was made from the environment.
swiftep_code swiftep_communicator_join_from_environment(
  swiftep_nanoseconds timeout, swiftep_communicator **communicator, swiftep_error **error);

/// Becomes the last rank of a group that was made at `point`.
swiftep_code swiftep_communicator_join_at(
  const swiftep_meeting_point *point, swiftep_nanoseconds timeout, swiftep_communicator **communicator,
  swiftep_error **error);

int32_t swiftep_communicator_rank(const swiftep_communicator *communicator);
int32_t swiftep_communicator_rank_count(const swiftep_communicator *communicator);
/// How often the group has changed.
int32_t swiftep_communicator_generation(const swiftep_communicator *communicator);
/// The rank's membership ends when its communicator and its buffers are freed.
void swiftep_communicator_free(swiftep_communicator *communicator);

// MARK: Plans

/// How received rows are ordered.
enum {
  /// One row a token, by source rank, then token.
  SWIFTEP_BY_SOURCE = 0,
  /// One row per token and expert, grouped by local expert; in a group by source rank, then token.
  SWIFTEP_BY_EXPERT = 1,
  /// The same with a group of fixed size for each local expert, `[local experts, ranks x tokens_per_rank_max, ...]`.
  SWIFTEP_GROUPED = 2,
};

/// How the scales of quantized rows are stored.
enum {
  SWIFTEP_NO_SCALES = 0,
  /// Of FP8 rows: fp32 `[rows, ceil(hidden / 128)]`.
  SWIFTEP_SCALES_FP32 = 1,
  /// Of FP8 rows: powers of two as biased exponents, packed by four: int32 `[rows, ceil(hidden / 512)]`.
  SWIFTEP_SCALES_UE8M0 = 2,
  /// As fp32, each rounded up to a power of two.
  SWIFTEP_SCALES_POWER_OF_TWO = 3,
  /// Of NVFP4 rows: fp8E4M3 `[rows, hidden / 16]`, and a global scale.
  SWIFTEP_SCALES_NVFP4 = 4,
};

/// Whether a buffer can go on without some of its ranks.
enum {
  SWIFTEP_MASKING_NONE = 0,
  SWIFTEP_MASKING_MANUAL = 1,
  /// A missing rank is masked, and the operation goes on without it.
  SWIFTEP_MASKING_AUTOMATIC = 2,
};

/// How rows travel in a combine.
enum {
  /// As they are.
  SWIFTEP_ENCODING_NONE = 0,
  /// bf16 rows of a multiple of 128 channels as 10 bits a channel: a sign, and the logarithm of the magnitude in 510 steps
  /// between the least and the largest of a block of 128 channels. A block that this would change by more than 1.1% of a value
  /// is read as it is. All rows are coded first, in memory of the arena, wherever they lie, and not in steps; where the plan
  /// has none for that (`combine_encoding`), the arena grows.
  SWIFTEP_ENCODING_LOGFMT = 1,
};

/// A job, and how much of it a buffer holds at a time.
typedef struct swiftep_plan_options {
  size_t size;
  int32_t rank_count;
  /// Tokens that one rank dispatches at most.
  int32_t tokens_per_rank_max;
  /// Channels of a token.
  int32_t hidden;
  int32_t top_k;
  int32_t expert_count;
  /// The rank of each expert; NULL: the same number for each rank, the first ranks one more.
  const int32_t *expert_owners;
  /// Of received rows; 0: bf16.
  int32_t dtype;
  int32_t scales;
  /// Bytes per token of each sidecar.
  const int64_t *sidecar_byte_counts;
  int32_t sidecar_count;
  int32_t layout;
  /// 0: 1.
  int32_t expert_alignment;
  /// Of the rows that combine sums; 0: bf16.
  int32_t combine_dtype;
  /// 4 or 8; 0: 8.
  int32_t index_byte_count;
  /// Results that are alive at the same time; 0: 1.
  int32_t result_count;
  /// Workers that one call uses; 0: 1.
  int32_t workers;
  int32_t masking;
  /// Tokens that one rank receives at most; NULL: all tokens of all ranks.
  const int64_t *received_tokens_max;
  /// Not zero: there is memory for rows of combines that lie outside the arena.
  int32_t is_staged;
  /// With `is_staged`: so many tokens at a time; 0: all at once.
  int32_t staged_tokens_per_step;
  /// How far the arena may grow; 0: eight times the plan, at least 1 GiB.
  int64_t arena_byte_count_max;
  /// How combined rows travel: there is memory for that. As `encoding` of `swiftep_combine_options`.
  int32_t combine_encoding;
} swiftep_plan_options;

/// What a buffer takes, to the byte, before anything is allocated.
typedef struct swiftep_plan swiftep_plan;

swiftep_code swiftep_plan_create(const swiftep_plan_options *options, swiftep_plan **plan, swiftep_error **error);
/// Bytes of one rank, of everything.
int64_t swiftep_plan_byte_count(const swiftep_plan *plan);
/// Bytes of the memory that peers reach.
int64_t swiftep_plan_arena_byte_count(const swiftep_plan *plan);
int64_t swiftep_plan_arena_byte_count_max(const swiftep_plan *plan);
/// Rows that one result of a dispatch holds.
int64_t swiftep_plan_rows_per_result(const swiftep_plan *plan);
int32_t swiftep_plan_part_count(const swiftep_plan *plan);
/// Bytes of a part of it, and its name, which is there as long as the plan; -1 and NULL where there is no such part.
int64_t swiftep_plan_part(const swiftep_plan *plan, int32_t index, const char **name);
void swiftep_plan_free(swiftep_plan *plan);

// MARK: Buffers

/// One rank's end of an expert-parallel group.
typedef struct swiftep_buffer swiftep_buffer;

typedef struct swiftep_buffer_options {
  size_t size;
  /// Threads, or multiprocessors, that one call can use; 0: this rank's share of the cores, or of half of the GPU.
  int32_t workers;
  /// What its operations run on.
  int32_t device_type, device_index;
  /// How long a rank is waited for before it is missing.
  swiftep_nanoseconds timeout;
} swiftep_buffer_options;

/// Takes the memory of the plan at once. Collective. `options`: NULL: the defaults.
swiftep_code swiftep_buffer_create(
  const swiftep_communicator *communicator, const swiftep_plan *plan, const swiftep_buffer_options *options,
  swiftep_buffer **buffer, swiftep_error **error);

/// Ends the buffer after what was queued has finished. Not collective. Results stay readable.
void swiftep_buffer_close(swiftep_buffer *buffer);
/// Closes the buffer, too, once nothing of it is left: results and handles keep it. That waits for what was queued, a peer
/// that does not come for the buffer's timeout.
void swiftep_buffer_free(swiftep_buffer *buffer);

int32_t swiftep_buffer_rank(const swiftep_buffer *buffer);
int32_t swiftep_buffer_rank_count(const swiftep_buffer *buffer);
/// Workers that one call can use.
int32_t swiftep_buffer_worker_count_max(const swiftep_buffer *buffer);
/// Experts that this rank holds.
int32_t swiftep_buffer_local_expert_count(const swiftep_buffer *buffer);
/// Rows of what a dispatch of worst-case size returns here, of grouped ones those of one group; -1: there is no such layout.
int64_t swiftep_buffer_worst_case_row_count(
  const swiftep_buffer *buffer, int32_t layout, int32_t top_k, int32_t expert_alignment);
/// Bytes of this rank's arena now.
int64_t swiftep_buffer_arena_byte_count(const swiftep_buffer *buffer);

/// A new tensor of zeros that calls of this buffer can be given. Not collective.
swiftep_code swiftep_buffer_make_tensor(
  const swiftep_buffer *buffer, int32_t dtype, int32_t dimension_count, const int64_t *shape, swiftep_tensor *tensor,
  swiftep_error **error);

/// A tensor in the arena, with whatever lay there before, for what `swiftep_combine` is to read where it lies: memory that
/// the caller divides, and that the plan does not count. Not collective. Fails with `OUT_OF_MEMORY` where the arena can hold
/// no more.
swiftep_code swiftep_buffer_make_arena_tensor(
  const swiftep_buffer *buffer, int32_t dtype, int32_t dimension_count, const int64_t *shape, swiftep_tensor *tensor,
  swiftep_error **error);

/// The ranks that this one goes on without, a bit each. Not collective.
swiftep_code swiftep_buffer_masked_ranks(const swiftep_buffer *buffer, uint64_t *ranks, swiftep_error **error);
/// Goes on without these ranks too, a bit each. Not collective.
swiftep_code swiftep_buffer_mask(const swiftep_buffer *buffer, uint64_t ranks, swiftep_error **error);
/// Takes masked ranks back. Collective for all that are not masked, and those that return.
swiftep_code swiftep_buffer_unmask(const swiftep_buffer *buffer, uint64_t ranks, swiftep_error **error);

/// What this rank's operations did lately and do now, as a text; the caller frees it with `swiftep_text_free`.
swiftep_code swiftep_buffer_flight_record(const swiftep_buffer *buffer, char **text, swiftep_error **error);
void swiftep_text_free(char *text);

// MARK: Events

/// A point in the work of a buffer, or of the caller.
typedef struct swiftep_event swiftep_event;

/// An event that the caller completes with `swiftep_event_signal`; NULL where there is no memory.
swiftep_event *swiftep_event_create(void);
void swiftep_event_signal(const swiftep_event *event);
/// What a stream of the caller's (`CUstream`, `cudaStream_t`) has been told to do by now.
swiftep_code swiftep_event_record(
  void *stream, int32_t device_index, swiftep_event **event, swiftep_error **error);
/// What is queued on the stream later comes behind the event, without any wait of the host.
swiftep_code swiftep_event_enqueue_wait(const swiftep_event *event, void *stream, swiftep_error **error);
int32_t swiftep_event_is_complete(const swiftep_event *event);
/// Returns when the event is complete; fails with what its operation has failed with.
swiftep_code swiftep_event_wait(const swiftep_event *event, swiftep_error **error);
void swiftep_event_free(swiftep_event *event);

// MARK: Dispatch

/// What repeats a dispatch, or undoes it. Belongs to the buffer that made it.
typedef struct swiftep_handle swiftep_handle;

int64_t swiftep_handle_token_count(const swiftep_handle *handle);
/// Rows of the tensors that the dispatch returned.
int64_t swiftep_handle_row_capacity(const swiftep_handle *handle);
int32_t swiftep_handle_top_k(const swiftep_handle *handle);
int32_t swiftep_handle_layout(const swiftep_handle *handle);
void swiftep_handle_free(swiftep_handle *handle);

/// How large the tensors are that a dispatch returns.
enum {
  /// As large as what arrives: the call returns when the counts are known.
  SWIFTEP_EXACT = 0,
  /// For all tokens of all ranks, or as many as the plan allows; nobody waits for counts.
  SWIFTEP_WORST_CASE = 1,
};

/// What waits for the peers of an operation.
enum {
  SWIFTEP_WAITING_WORKERS = 0,
  /// On a GPU the stream, so that nothing occupies a multiprocessor meanwhile.
  SWIFTEP_WAITING_STREAM = 1,
};

enum {
  /// `[local experts, rows of a group, scales]`.
  SWIFTEP_ROW_MAJOR = 0,
  /// Of grouped rows that are quantized on the way: `[local experts, scales, rows of a group]`.
  SWIFTEP_COLUMN_MAJOR = 1,
};

/// One dispatch. One of `indices`, `table` and `handle` says where tokens go.
typedef struct swiftep_dispatch_options {
  size_t size;
  /// `[tokens, hidden]`, in rows of a multiple of 16 bytes: bf16, fp16, fp32, fp8E4M3 or, opaque, uint8.
  const swiftep_tensor *x;
  /// Of fp8E4M3 rows: fp32 `[tokens, ceil(hidden / 128)]`, or packed UE8M0, int32 `[tokens, ceil(hidden / 512)]`.
  /// In columns, too: strides of 1 and at least `tokens`.
  const swiftep_tensor *scales;
  /// Up to three arrays `[tokens, ...]` that travel with the rows, in rows of a multiple of 4 bytes.
  const swiftep_tensor *const *sidecars;
  int32_t sidecar_count;
  int32_t layout;
  /// Experts of each token, int32 or int64 `[tokens, top_k]`, -1 for none.
  const swiftep_tensor *indices;
  /// fp32 `[tokens, top_k]`; NULL: none.
  const swiftep_tensor *weights;
  /// uint8 `[tokens, ranks]`: not zero where a token goes to a rank.
  const swiftep_tensor *table;
  /// As an earlier dispatch of this buffer; `layout` and `expert_alignment` are that one's.
  const swiftep_handle *handle;
  int32_t expert_alignment;
  /// By expert: not zero: rows between groups are zero bytes.
  int32_t zeroes_padding;
  int32_t sizing;
  /// bf16 rows arrive as FP8 with scales in this format (`SWIFTEP_SCALES_*`), or as NVFP4.
  int32_t quantization;
  /// Of NVFP4 rows; 0: 1.
  float global_scale;
  int32_t scale_order;
  /// Used where there is that much to do; 0: all that the buffer has.
  int32_t workers;
  int32_t waiting;
  /// int32 `[local experts]`, to which the tokens of each are added; NULL: none.
  const swiftep_tensor *expert_statistics;
  /// int64 `[ranks]`, to which the nanoseconds are added that each was waited for; NULL: none.
  const swiftep_tensor *wait_statistics;
  /// Not zero: the call only sends, and `swiftep_dispatch_receive` does the rest.
  int32_t receives_later;
  /// Not zero: the call returns while rows still travel; the result's event says when they have arrived.
  int32_t is_asynchronous;
  /// What is given is ready only when these events are complete.
  const swiftep_event *const *after;
  int32_t after_count;
  /// Not zero: `stream` is a stream of the caller's on the buffer's GPU (`CUstream`; NULL is the default stream): the
  /// operation comes behind what is queued there, and what is queued there later behind the operation.
  int32_t uses_stream;
  void *stream;
  /// By source and by expert, of worst-case size: rows of the result, whatever the plan says; 0: as many as the plan does.
  /// Where more arrive on any rank, all fail with `SWIFTEP_OUT_OF_MEMORY`.
  int32_t rows_max;
} swiftep_dispatch_options;

/// What has arrived at this rank.
typedef struct swiftep_dispatch_result swiftep_dispatch_result;

/// Collective. Asynchronous calls use tensors until the result's event is complete (see `swiftep_tensor`).
swiftep_code swiftep_dispatch(
  swiftep_buffer *buffer, const swiftep_dispatch_options *options, swiftep_dispatch_result **result,
  swiftep_error **error);

/// Tensors of a dispatch's result. Where `[rows, ...]` is written, grouped ones have `[local experts, rows of a group, ...]`.
/// Counts are valid once the event is complete; after a dispatch of exact size, at once.
enum {
  /// `[rows, hidden]`; NVFP4: `[rows, hidden / 2]`.
  SWIFTEP_ROWS = 0,
  /// Of FP8 and NVFP4 rows.
  SWIFTEP_ROW_SCALES = 1,
  /// int32 `[rows, 2]`: source rank and token; -1 in rows that no token fills, except grouped ones and with masks.
  SWIFTEP_ORIGINS = 2,
  /// `[rows, top_k]`, by expert `[rows, 1]`, in the sender's index type: local experts, -1 for those of other ranks.
  SWIFTEP_TOP_K_INDICES = 3,
  /// fp32, as the indices.
  SWIFTEP_TOP_K_WEIGHTS = 4,
  /// int32 `[1]`: rows that arrived, padding between groups included.
  SWIFTEP_ROW_COUNT = 5,
  /// int32 `[ranks]`.
  SWIFTEP_TOKENS_PER_SOURCE = 6,
  /// int32 `[local experts]`, rounded up to the alignment.
  SWIFTEP_TOKENS_PER_EXPERT = 7,
  /// int32 `[local experts]`, as they are.
  SWIFTEP_UNALIGNED_TOKENS_PER_EXPERT = 8,
  /// int32 `[local experts, ranks + 1]`: where the rows of each source begin in a group; not by source, not with masks.
  SWIFTEP_SOURCE_OFFSETS = 9,
  /// int32 `[local experts, ranks]`, with masks: tokens of each expert from each source.
  SWIFTEP_SOURCE_COUNTS = 10,
  /// int32 `[ranks, ranks]`: tokens from each source rank, by row, to each rank.
  SWIFTEP_TOKENS_PER_PAIR = 11,
  /// The first of the sidecars; the others follow.
  SWIFTEP_SIDECARS = 16,
};

/// Stores one of the result's tensors, which the caller releases. Returns 0, and clears `tensor`, where it has none such.
int32_t swiftep_dispatch_result_tensor(const swiftep_dispatch_result *result, int32_t which, swiftep_tensor *tensor);
/// A handle of the caller's.
swiftep_handle *swiftep_dispatch_result_handle(const swiftep_dispatch_result *result);
/// Complete when all rows have arrived; the caller's.
swiftep_event *swiftep_dispatch_result_event(const swiftep_dispatch_result *result);
/// The second half of a dispatch with `receives_later`; once. Not collective.
swiftep_code swiftep_dispatch_receive(const swiftep_dispatch_result *result, swiftep_error **error);
/// The result's tensors and handle stay with whoever has them.
void swiftep_dispatch_result_free(swiftep_dispatch_result *result);

// MARK: Combine

/// One combine.
typedef struct swiftep_combine_options {
  size_t size;
  /// `[rows, hidden]`, grouped `[local experts, rows of a group, hidden]`: bf16, fp16 or fp32, as many as the dispatch
  /// returned. Not to be changed until the result's event is complete. In arena memory, nothing is copied
  /// (`swiftep_combine_input`, or what a dispatch has returned).
  const swiftep_tensor *rows;
  const swiftep_handle *handle;
  /// By expert: fp32 `[tokens, top_k]`, multiplied into the experts' rows; those of weight 0 are not read. NULL: none.
  const swiftep_tensor *row_weights;
  /// fp32 `[rows, top_k]`, by expert `[rows, 1]`: brought back to the tokens' owners and summed; NULL: none.
  const swiftep_tensor *top_k_weights;
  /// Up to two `[tokens, hidden]` in the rows' dtype, added last.
  const swiftep_tensor *const *biases;
  int32_t bias_count;
  /// Where to put the sums, `[tokens, hidden]` in the rows' dtype; NULL: arena memory that the result owns.
  const swiftep_tensor *output;
  /// Used where there is that much to do; 0: all that the buffer has.
  int32_t workers;
  int32_t waiting;
  const swiftep_tensor *wait_statistics;
  /// Not zero: the call only tells the peers that the rows are ready, and `swiftep_combine_receive` does the rest.
  int32_t receives_later;
  int32_t is_asynchronous;
  const swiftep_event *const *after;
  int32_t after_count;
  int32_t uses_stream;
  void *stream;
  /// How rows travel, the same on all ranks.
  int32_t encoding;
} swiftep_combine_options;

/// What has come back to this rank's tokens.
typedef struct swiftep_combine_result swiftep_combine_result;

/// Brings rows back to their tokens' owners and sums them, in Float, rounded once. Collective.
swiftep_code swiftep_combine(
  swiftep_buffer *buffer, const swiftep_combine_options *options, swiftep_combine_result **result,
  swiftep_error **error);

/// Tensors of a combine's result.
enum {
  /// `[tokens, hidden]`.
  SWIFTEP_TOKENS = 0,
  /// fp32 `[tokens, top_k]`, where weights were given.
  SWIFTEP_SUMMED_WEIGHTS = 1,
};

/// As `swiftep_dispatch_result_tensor`. Tokens that were put into `output` are the caller's own memory.
int32_t swiftep_combine_result_tensor(const swiftep_combine_result *result, int32_t which, swiftep_tensor *tensor);
/// Complete when the sums are there and all peers have read this rank's rows; the caller's.
swiftep_event *swiftep_combine_result_event(const swiftep_combine_result *result);
/// The second half of a combine with `receives_later`; once. Collective.
swiftep_code swiftep_combine_receive(const swiftep_combine_result *result, swiftep_error **error);
void swiftep_combine_result_free(swiftep_combine_result *result);

/// A tensor for `rows` that lies where peers read it, so that nothing is copied: `[rows, hidden]`, grouped `[local experts,
/// rows of a group, hidden]`, with whatever lay there before. Not collective. The caller releases it.
swiftep_code swiftep_combine_input(
  const swiftep_buffer *buffer, const swiftep_handle *handle, int32_t hidden, int32_t dtype, swiftep_tensor *tensor,
  swiftep_error **error);

// MARK: Graphs

/// Operations of one buffer, recorded once and run as often as wanted.
typedef struct swiftep_graph swiftep_graph;

/// Records what `body` calls on this buffer instead of running it. It returns 0, or what the function is to return.
///
/// Calls are asynchronous, dispatches of worst-case size. Nothing else calls the buffer meanwhile, and where ranks are
/// threads, none launches before all have recorded. Not collective.
///
/// Returns what `body` did, without an error, where that is not 0.
swiftep_code swiftep_graph_record(
  swiftep_buffer *buffer, swiftep_code (*body)(void *context), void *context, swiftep_graph **graph,
  swiftep_error **error);

/// Runs the operations once more. Collective: all ranks launch graphs of the same operations. `event`, unless NULL, is given
/// what is complete when all of them are.
swiftep_code swiftep_graph_launch(
  const swiftep_graph *graph, int32_t uses_stream, void *stream, swiftep_event **event, swiftep_error **error);
void swiftep_graph_free(swiftep_graph *graph);

#ifdef __cplusplus
}
#endif

#endif
