// What the C ABI promises beyond what the Swift library does, which has tests of its own: that every function and field
// means what the header says. Ranks are threads, then processes.
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <swiftep.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition);    \
      exit(1);                                                                    \
    }                                                                             \
  } while (0)

// A call that succeeds.
#define DO(call)                                                                  \
  do {                                                                            \
    swiftep_error *error = (swiftep_error *)1;                                    \
    if ((call) != SWIFTEP_OK) {                                                   \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, error->message);         \
      exit(1);                                                                    \
    }                                                                             \
    CHECK(error == NULL);                                                         \
  } while (0)

// A call that fails; `error` is there for what follows, and is freed behind it.
#define FAIL(call, wanted, ...)                                                   \
  do {                                                                            \
    swiftep_error *error = NULL;                                                  \
    swiftep_code code = (call);                                                   \
    CHECK(code == (wanted));                                                      \
    CHECK(error != NULL && error->code == code && error->size >= sizeof *error);  \
    CHECK(error->message != NULL && error->message[0] != 0);                      \
    __VA_ARGS__;                                                                  \
    swiftep_error_free(error);                                                    \
  } while (0)

enum { RANKS = 2, TOKENS = 4, HIDDEN = 16, TOP_K = 2, EXPERTS = 4 };

// MARK: Ranks

typedef struct {
  int rank;
  swiftep_buffer *buffer;
} Rank;

typedef struct {
  swiftep_communicator *communicator;
  const swiftep_plan_options *options;
  swiftep_nanoseconds timeout;
  void (*body)(Rank *rank);
} Job;

static void run_body(const Job *job) {
  swiftep_plan *plan;
  Rank rank = {.rank = swiftep_communicator_rank(job->communicator)};
  DO(swiftep_plan_create(job->options, &plan, &error));
  swiftep_buffer_options options = {.size = sizeof options, .workers = 1, .timeout = job->timeout};
  DO(swiftep_buffer_create(job->communicator, plan, &options, &rank.buffer, &error));
  swiftep_plan_free(plan);
  CHECK(swiftep_buffer_rank(rank.buffer) == rank.rank);
  CHECK(swiftep_buffer_rank_count(rank.buffer) == job->options->rank_count);
  CHECK(swiftep_buffer_worker_count_max(rank.buffer) == 1);
  job->body(&rank);
  swiftep_buffer_free(rank.buffer);
  swiftep_communicator_free(job->communicator);
}

static void *run_thread(void *job) {
  run_body(job);
  return NULL;
}

static void on_threads(const swiftep_plan_options *options, swiftep_nanoseconds timeout, void (*body)(Rank *)) {
  swiftep_communicator *communicators[RANKS];
  Job jobs[RANKS];
  pthread_t threads[RANKS];
  DO(swiftep_communicators_of_threads(RANKS, communicators, &error));
  for (int rank = 0; rank < RANKS; rank++) {
    CHECK(swiftep_communicator_rank(communicators[rank]) == rank);
    CHECK(swiftep_communicator_rank_count(communicators[rank]) == RANKS);
    CHECK(swiftep_communicator_generation(communicators[rank]) == 0);
    jobs[rank] = (Job){communicators[rank], options, timeout, body};
    CHECK(pthread_create(&threads[rank], NULL, run_thread, &jobs[rank]) == 0);
  }
  for (int rank = 0; rank < RANKS; rank++) pthread_join(threads[rank], NULL);
}

// MARK: Inputs: token t of rank r has 100 r + t in all channels, and goes to experts t and t + 1 of four.

typedef struct {
  float values[TOKENS * HIDDEN], weights[TOKENS * TOP_K];
  int64_t experts[TOKENS * TOP_K];
  int64_t x_shape[2], k_shape[2];
  swiftep_tensor x, indices, weights_tensor;
  swiftep_dispatch_options options;
} Input;

static swiftep_tensor make_tensor(void *data, int32_t dtype, const int64_t *shape) {
  return (swiftep_tensor){
    .size = sizeof(swiftep_tensor), .data = data, .dtype = dtype, .dimension_count = 2, .shape = shape};
}

static void fill(Input *input, int rank) {
  *input = (Input){.x_shape = {TOKENS, HIDDEN}, .k_shape = {TOKENS, TOP_K}};
  for (int token = 0; token < TOKENS; token++) {
    for (int channel = 0; channel < HIDDEN; channel++) input->values[token * HIDDEN + channel] = 100 * rank + token;
    for (int slot = 0; slot < TOP_K; slot++) {
      input->experts[token * TOP_K + slot] = (token + slot) % EXPERTS;
      input->weights[token * TOP_K + slot] = 0.25f + 0.5f * slot;
    }
  }
  input->x = make_tensor(input->values, SWIFTEP_FP32, input->x_shape);
  input->indices = make_tensor(input->experts, SWIFTEP_INT64, input->k_shape);
  input->weights_tensor = make_tensor(input->weights, SWIFTEP_FP32, input->k_shape);
  input->options = (swiftep_dispatch_options){
    .size = sizeof input->options, .x = &input->x, .indices = &input->indices, .weights = &input->weights_tensor};
}

static const swiftep_plan_options plain = {
  .size = sizeof plain, .rank_count = RANKS, .tokens_per_rank_max = TOKENS, .hidden = HIDDEN, .top_k = TOP_K,
  .expert_count = EXPERTS, .dtype = SWIFTEP_FP32, .combine_dtype = SWIFTEP_FP32, .result_count = 2, .is_staged = 1};

static swiftep_tensor get(const swiftep_dispatch_result *result, int which) {
  swiftep_tensor tensor = {.size = sizeof tensor};
  CHECK(swiftep_dispatch_result_tensor(result, which, &tensor) == 1);
  CHECK(tensor.retain != NULL && tensor.release != NULL && tensor.device_type == SWIFTEP_CPU);
  return tensor;
}

static int has(const swiftep_dispatch_result *result, int which) {
  swiftep_tensor tensor = {.size = sizeof tensor, .data = &tensor};
  int found = swiftep_dispatch_result_tensor(result, which, &tensor);
  CHECK(found || (tensor.data == NULL && tensor.size == sizeof tensor));
  swiftep_tensor_release(&tensor);
  CHECK(tensor.data == NULL && tensor.release == NULL && tensor.size == sizeof tensor);
  return found;
}

static int32_t number(const swiftep_dispatch_result *result, int which, int index) {
  swiftep_tensor tensor = get(result, which);
  CHECK(tensor.dtype == SWIFTEP_INT32);
  int32_t found = ((const int32_t *)tensor.data)[index];
  swiftep_tensor_release(&tensor);
  return found;
}

// What combine returns of rows that are as they came: each token, `times` times.
static void check_sums(const swiftep_combine_result *result, int rank, float times) {
  swiftep_tensor tokens = {.size = sizeof tokens};
  CHECK(swiftep_combine_result_tensor(result, SWIFTEP_TOKENS, &tokens) == 1);
  CHECK(tokens.dtype == SWIFTEP_FP32 && tokens.dimension_count == 2);
  CHECK(tokens.shape[0] == TOKENS && tokens.shape[1] == HIDDEN);
  for (int index = 0; index < TOKENS * HIDDEN; index++) {
    CHECK(((const float *)tokens.data)[index] == times * (100 * rank + index / HIDDEN));
  }
  swiftep_tensor_release(&tokens);
}

// Ranks that a token goes to: experts 0 and 1 are rank 0's, 2 and 3 rank 1's.
static int is_split(int token) { return token % 2; }

// MARK: Operations

static swiftep_dispatch_result *dispatch(const Rank *rank, const swiftep_dispatch_options *options) {
  swiftep_dispatch_result *result;
  DO(swiftep_dispatch(rank->buffer, options, &result, &error));
  return result;
}

static swiftep_combine_result *combine(const Rank *rank, const swiftep_combine_options *options) {
  swiftep_combine_result *result;
  DO(swiftep_combine(rank->buffer, options, &result, &error));
  return result;
}

static void check_round_trip(Rank *rank) {
  Input input;
  fill(&input, rank->rank);
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  // Of each rank's four tokens, three go to rank 0 (experts 0 1, 1 2, 3 0), and three to rank 1.
  swiftep_tensor rows = get(result, SWIFTEP_ROWS), origins = get(result, SWIFTEP_ORIGINS);
  CHECK(rows.dtype == SWIFTEP_FP32 && rows.dimension_count == 2 && rows.shape[0] == 6 && rows.shape[1] == HIDDEN);
  CHECK(origins.dtype == SWIFTEP_INT32 && origins.shape[0] == 6 && origins.shape[1] == 2);
  for (int row = 0; row < 6; row++) {
    const int32_t *origin = (const int32_t *)origins.data + 2 * row;
    CHECK(origin[0] == row / 3);
    CHECK(((const float *)rows.data)[row * HIDDEN] == 100 * origin[0] + origin[1]);
  }
  CHECK(number(result, SWIFTEP_ROW_COUNT, 0) == 6);
  CHECK(number(result, SWIFTEP_TOKENS_PER_SOURCE, 1) == 3);
  CHECK(number(result, SWIFTEP_TOKENS_PER_EXPERT, 0) == 4);
  CHECK(number(result, SWIFTEP_UNALIGNED_TOKENS_PER_EXPERT, 1) == 4);
  swiftep_tensor indices = get(result, SWIFTEP_TOP_K_INDICES), weights = get(result, SWIFTEP_TOP_K_WEIGHTS);
  CHECK(indices.dtype == SWIFTEP_INT64 && indices.shape[1] == TOP_K);
  CHECK(weights.dtype == SWIFTEP_FP32 && weights.shape[1] == TOP_K);
  CHECK(!has(result, SWIFTEP_ROW_SCALES) && !has(result, SWIFTEP_SOURCE_OFFSETS) && !has(result, SWIFTEP_SOURCE_COUNTS));
  CHECK(!has(result, SWIFTEP_SIDECARS) && !has(result, -1) && !has(result, 1000));

  swiftep_handle *handle = swiftep_dispatch_result_handle(result);
  swiftep_event *event = swiftep_dispatch_result_event(result);
  CHECK(swiftep_event_is_complete(event));
  DO(swiftep_event_wait(event, &error));
  swiftep_event_free(event);
  // Tensors and the handle outlive the result.
  swiftep_dispatch_result_free(result);
  CHECK(swiftep_handle_token_count(handle) == TOKENS && swiftep_handle_row_capacity(handle) == 6);
  CHECK(swiftep_handle_top_k(handle) == TOP_K && swiftep_handle_layout(handle) == SWIFTEP_BY_SOURCE);

  float bias[TOKENS * HIDDEN], output[TOKENS * HIDDEN];
  for (int index = 0; index < TOKENS * HIDDEN; index++) bias[index] = 1000;
  swiftep_tensor bias_tensor = make_tensor(bias, SWIFTEP_FP32, input.x_shape);
  swiftep_tensor output_tensor = make_tensor(output, SWIFTEP_FP32, input.x_shape);
  swiftep_combine_options options = {
    .size = sizeof options, .rows = &rows, .handle = handle, .top_k_weights = &weights,
    .biases = (const swiftep_tensor *[]){&bias_tensor}, .bias_count = 1, .output = &output_tensor};
  swiftep_combine_result *combined = combine(rank, &options);
  for (int index = 0; index < TOKENS * HIDDEN; index++) {
    int token = index / HIDDEN;
    CHECK(output[index] == (is_split(token) ? 2 : 1) * (100 * rank->rank + token) + 1000);
  }
  swiftep_tensor summed = {.size = sizeof summed};
  CHECK(swiftep_combine_result_tensor(combined, SWIFTEP_SUMMED_WEIGHTS, &summed) == 1);
  CHECK(((const float *)summed.data)[2 * TOP_K] == 0.25f && ((const float *)summed.data)[2 * TOP_K + 1] == 0.75f);
  swiftep_tensor_release(&summed);
  CHECK(swiftep_combine_result_tensor(combined, 2, &summed) == 0);
  swiftep_event *done = swiftep_combine_result_event(combined);
  CHECK(swiftep_event_is_complete(done));
  swiftep_event_free(done);
  swiftep_combine_result_free(combined);

  // The same once more, with the handle; rows of the caller's are staged.
  input.options = (swiftep_dispatch_options){.size = sizeof input.options, .x = &input.x, .handle = handle};
  result = dispatch(rank, &input.options);
  CHECK(number(result, SWIFTEP_ROW_COUNT, 0) == 6 && !has(result, SWIFTEP_TOP_K_INDICES));
  swiftep_dispatch_result_free(result);
  int64_t rows_shape[2] = {6, HIDDEN};
  float copy[6 * HIDDEN];
  memcpy(copy, rows.data, sizeof copy);
  swiftep_tensor copied = make_tensor(copy, SWIFTEP_FP32, rows_shape);
  options = (swiftep_combine_options){.size = sizeof options, .rows = &copied, .handle = handle};
  combined = combine(rank, &options);
  swiftep_combine_result_free(combined);

  // A tensor can be held twice.
  rows.retain(rows.owner);
  swiftep_tensor again = rows;
  swiftep_tensor_release(&rows);
  CHECK(((const float *)again.data)[0] == copy[0]);
  swiftep_tensor_release(&again);
  swiftep_tensor_release(&origins);
  swiftep_tensor_release(&indices);
  swiftep_tensor_release(&weights);
  swiftep_handle_free(handle);
}

static void check_formats(Rank *rank) {
  Input input;
  fill(&input, rank->rank);
  // By expert: rows 8, those of local expert 1 behind those of 0; each arrives as it is to be weighted.
  input.options.layout = SWIFTEP_BY_EXPERT;
  input.options.expert_alignment = 8;
  input.options.zeroes_padding = 1;
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  CHECK(number(result, SWIFTEP_ROW_COUNT, 0) == 16 && number(result, SWIFTEP_TOKENS_PER_EXPERT, 0) == 8);
  CHECK(number(result, SWIFTEP_UNALIGNED_TOKENS_PER_EXPERT, 0) == 4 && number(result, SWIFTEP_SOURCE_OFFSETS, 1) == 2);
  swiftep_tensor rows = get(result, SWIFTEP_ROWS);
  CHECK(((const float *)rows.data)[4 * HIDDEN] == 0);
  swiftep_handle *handle = swiftep_dispatch_result_handle(result);
  CHECK(swiftep_handle_layout(handle) == SWIFTEP_BY_EXPERT);
  swiftep_combine_options options = {
    .size = sizeof options, .rows = &rows, .handle = handle, .row_weights = &input.weights_tensor};
  swiftep_combine_result *combined = combine(rank, &options);
  check_sums(combined, rank->rank, 1);  // 0.25 + 0.75
  swiftep_combine_result_free(combined);
  swiftep_handle_free(handle);
  swiftep_tensor_release(&rows);
  swiftep_dispatch_result_free(result);

  // By a table, with sidecars, of worst-case size.
  uint8_t table[TOKENS * RANKS];
  int32_t sidecar[TOKENS];
  int64_t table_shape[2] = {TOKENS, RANKS}, sidecar_shape[2] = {TOKENS, 1};
  for (int index = 0; index < TOKENS * RANKS; index++) table[index] = index % RANKS == rank->rank;
  for (int token = 0; token < TOKENS; token++) sidecar[token] = 7 * token;
  swiftep_tensor table_tensor = make_tensor(table, SWIFTEP_UINT8, table_shape);
  swiftep_tensor sidecar_tensor = make_tensor(sidecar, SWIFTEP_INT32, sidecar_shape);
  const swiftep_tensor *sidecars[2] = {&sidecar_tensor, &sidecar_tensor};
  swiftep_dispatch_options by_table = {
    .size = sizeof by_table, .x = &input.x, .table = &table_tensor, .sidecars = sidecars, .sidecar_count = 2,
    .sizing = SWIFTEP_WORST_CASE};
  result = dispatch(rank, &by_table);
  rows = get(result, SWIFTEP_ROWS);
  CHECK(rows.shape[0] == RANKS * TOKENS && number(result, SWIFTEP_ROW_COUNT, 0) == TOKENS);
  CHECK(number(result, SWIFTEP_SIDECARS, 3) == 21 && number(result, SWIFTEP_SIDECARS + 1, 1) == 7);
  CHECK(!has(result, SWIFTEP_SIDECARS + 2));
  swiftep_tensor_release(&rows);
  swiftep_dispatch_result_free(result);

  // Statistics are added to.
  int32_t tokens_of_experts[EXPERTS / RANKS] = {1, 1};
  int64_t waits[RANKS] = {0, 0}, experts_shape[1] = {EXPERTS / RANKS}, ranks_shape[1] = {RANKS};
  swiftep_tensor experts_tensor = make_tensor(tokens_of_experts, SWIFTEP_INT32, experts_shape);
  swiftep_tensor waits_tensor = make_tensor(waits, SWIFTEP_INT64, ranks_shape);
  experts_tensor.dimension_count = waits_tensor.dimension_count = 1;
  fill(&input, rank->rank);
  input.options.expert_statistics = &experts_tensor;
  input.options.wait_statistics = &waits_tensor;
  if (rank->rank == 1) usleep(20000);
  swiftep_dispatch_result_free(dispatch(rank, &input.options));
  CHECK(tokens_of_experts[0] == 5 && tokens_of_experts[1] == 5);
  CHECK(rank->rank == 1 || waits[1] > 1000000);
}

static void check_quantized(Rank *rank) {
  int64_t x_shape[2] = {1, 128}, k_shape[2] = {1, 1};
  uint16_t values[128];
  int32_t experts[1] = {rank->rank};
  for (int channel = 0; channel < 128; channel++) values[channel] = 0x3f80;  // 1 in BF16
  swiftep_tensor x = make_tensor(values, SWIFTEP_BF16, x_shape), indices = make_tensor(experts, SWIFTEP_INT32, k_shape);
  for (int format = SWIFTEP_SCALES_FP32; format <= SWIFTEP_SCALES_NVFP4; format++) {
    for (int order = SWIFTEP_ROW_MAJOR; order <= SWIFTEP_COLUMN_MAJOR; order++) {
      swiftep_dispatch_options options = {
        .size = sizeof options, .x = &x, .indices = &indices, .layout = SWIFTEP_GROUPED, .quantization = format,
        .scale_order = order, .global_scale = format == SWIFTEP_SCALES_NVFP4 ? 64 : 0};
      swiftep_dispatch_result *result = dispatch(rank, &options);
      swiftep_tensor rows = get(result, SWIFTEP_ROWS), scales = get(result, SWIFTEP_ROW_SCALES);
      int is_fp4 = format == SWIFTEP_SCALES_NVFP4;
      CHECK(rows.dimension_count == 3 && rows.shape[0] == 1 && rows.shape[1] == RANKS);
      CHECK(rows.dtype == (is_fp4 ? SWIFTEP_FP4_E2M1_X2 : SWIFTEP_FP8_E4M3) && rows.shape[2] == (is_fp4 ? 64 : 128));
      CHECK(scales.dtype == (is_fp4 ? SWIFTEP_FP8_E4M3 : format == SWIFTEP_SCALES_UE8M0 ? SWIFTEP_INT32 : SWIFTEP_FP32));
      // 448 = 0x7e; 6 twice.
      CHECK(((const uint8_t *)rows.data)[0] == (is_fp4 ? 0x77 : format == SWIFTEP_SCALES_FP32 ? 0x7e : 0x78));
      if (format == SWIFTEP_SCALES_FP32) CHECK(((const float *)scales.data)[0] == 1.0f / 448);
      swiftep_tensor_release(&rows);
      swiftep_tensor_release(&scales);
      swiftep_dispatch_result_free(result);
    }
  }
}

// MARK: Memory

static void count_retain(void *count) { __atomic_add_fetch((int *)count, 1, __ATOMIC_SEQ_CST); }
static void count_release(void *count) { __atomic_sub_fetch((int *)count, 1, __ATOMIC_SEQ_CST); }

static void check_ownership(Rank *rank) {
  Input input;
  fill(&input, rank->rank);
  int owners[3] = {0, 0, 0};
  swiftep_tensor *tensors[3] = {&input.x, &input.indices, &input.weights_tensor};
  for (int index = 0; index < 3; index++) {
    tensors[index]->owner = &owners[index];
    tensors[index]->retain = count_retain;
    tensors[index]->release = count_release;
  }
  input.options.sizing = SWIFTEP_WORST_CASE;
  input.options.is_asynchronous = 1;
  swiftep_event *ready = swiftep_event_create();
  input.options.after = (const swiftep_event *const *)&ready;
  input.options.after_count = 1;
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  for (int index = 0; index < 3; index++) CHECK(owners[index] == 1);
  swiftep_event *event = swiftep_dispatch_result_event(result);
  CHECK(!swiftep_event_is_complete(event) && !swiftep_event_is_complete(ready));
  swiftep_event_signal(ready);
  swiftep_event_free(ready);
  DO(swiftep_event_wait(event, &error));
  CHECK(swiftep_event_is_complete(event));
  // Workers let go of what they used a moment later.
  for (int index = 0; index < 3; index++) {
    for (int spins = 0; __atomic_load_n(&owners[index], __ATOMIC_SEQ_CST) != 0; spins++) {
      CHECK(spins < 10000);
      usleep(1000);
    }
  }
  FAIL(swiftep_event_enqueue_wait(event, NULL, &error), SWIFTEP_INVALID_ARGUMENT);
  swiftep_event_free(event);
  swiftep_dispatch_result_free(result);
  // Of a call that fails, too.
  input.options.is_asynchronous = 0;
  input.options.after_count = 0;
  input.options.workers = 100;
  FAIL(swiftep_dispatch(rank->buffer, &input.options, &result, &error), SWIFTEP_INVALID_ARGUMENT);
  CHECK(result == NULL);
  for (int index = 0; index < 3; index++) CHECK(owners[index] == 0);
}

// The arena is as large as the plan, which has no room for staging: what is combined is read where it lies.
static void check_in_place(Rank *rank) {
  Input input;
  fill(&input, rank->rank);
  int64_t byte_count = swiftep_buffer_arena_byte_count(rank->buffer);
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  swiftep_tensor rows;
  swiftep_handle *handle = swiftep_dispatch_result_handle(result);
  swiftep_combine_options options = {.size = sizeof options, .handle = handle};
  swiftep_dispatch_result_free(result);

  swiftep_tensor given = {.size = sizeof given};
  DO(swiftep_combine_input(rank->buffer, handle, HIDDEN, SWIFTEP_FP32, &given, &error));
  CHECK(given.shape[0] == 6 && given.shape[1] == HIDDEN);
  for (int index = 0; index < 6 * HIDDEN; index++) ((float *)given.data)[index] = 0.5f;
  options.rows = &given;
  swiftep_combine_result *combined = combine(rank, &options);
  swiftep_tensor tokens = {.size = sizeof tokens};
  CHECK(swiftep_combine_result_tensor(combined, SWIFTEP_TOKENS, &tokens) == 1);
  CHECK(((const float *)tokens.data)[0] == 0.5f && ((const float *)tokens.data)[HIDDEN] == 1);
  swiftep_tensor_release(&tokens);
  swiftep_combine_result_free(combined);
  FAIL(swiftep_tensor_note_use(&input.x, NULL, &error), SWIFTEP_INVALID_ARGUMENT);
  DO(swiftep_tensor_note_use(&given, NULL, &error));
  swiftep_tensor_release(&given);
  CHECK(swiftep_buffer_arena_byte_count(rank->buffer) == byte_count);

  static float elsewhere[RANKS][1 << 12];
  int64_t shape[2] = {6, HIDDEN};
  swiftep_tensor other = make_tensor(elsewhere[rank->rank], SWIFTEP_FP32, shape);
  // All that the plan has room for is in use.
  swiftep_dispatch_result *results[2];
  swiftep_combine_result *sums[2];
  for (int index = 0; index < 2; index++) {
    results[index] = dispatch(rank, &input.options);
    rows = get(results[index], SWIFTEP_ROWS);
    // As a framework does that makes a tensor of its own of the address.
    swiftep_tensor view = make_tensor(rows.data, SWIFTEP_FP32, rows.shape);
    options.rows = &view;
    sums[index] = combine(rank, &options);
    swiftep_tensor_release(&rows);
  }
  options.rows = &other;
  FAIL(
    swiftep_combine(rank->buffer, &options, &combined, &error), SWIFTEP_OUT_OF_MEMORY,
    CHECK(error->needed_byte_count > error->available_byte_count && error->available_byte_count > 0));
  CHECK(combined == NULL);
  for (int index = 0; index < 2; index++) {
    swiftep_dispatch_result_free(results[index]);
    swiftep_combine_result_free(sums[index]);
  }
  swiftep_handle_free(handle);

  int64_t zeros_shape[3] = {2, 3, 4};
  swiftep_tensor zeros = {.size = sizeof zeros};
  DO(swiftep_buffer_make_tensor(rank->buffer, SWIFTEP_INT32, 3, zeros_shape, &zeros, &error));
  CHECK(zeros.dimension_count == 3 && zeros.shape[2] == 4 && ((const int32_t *)zeros.data)[23] == 0);
  swiftep_tensor_release(&zeros);
  FAIL(
    swiftep_buffer_make_tensor(rank->buffer, 0, 3, zeros_shape, &zeros, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(strcmp(error->argument, "dtype") == 0));
  char *text;
  DO(swiftep_buffer_flight_record(rank->buffer, &text, &error));
  CHECK(strstr(text, "dispatch") != NULL);
  swiftep_text_free(text);
}

// MARK: Halves and graphs

static void check_halves(Rank *rank) {
  Input input;
  fill(&input, rank->rank);
  input.options.sizing = SWIFTEP_WORST_CASE;
  input.options.receives_later = 1;
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  swiftep_event *event = swiftep_dispatch_result_event(result);
  FAIL(swiftep_event_wait(event, &error), SWIFTEP_INVALID_ARGUMENT);
  DO(swiftep_dispatch_receive(result, &error));
  DO(swiftep_event_wait(event, &error));
  FAIL(swiftep_dispatch_receive(result, &error), SWIFTEP_INVALID_ARGUMENT);
  swiftep_event_free(event);

  swiftep_tensor rows = get(result, SWIFTEP_ROWS);
  swiftep_handle *handle = swiftep_dispatch_result_handle(result);
  swiftep_combine_options options = {.size = sizeof options, .rows = &rows, .handle = handle, .receives_later = 1};
  swiftep_combine_result *combined = combine(rank, &options);
  DO(swiftep_combine_receive(combined, &error));
  FAIL(swiftep_combine_receive(combined, &error), SWIFTEP_INVALID_ARGUMENT);
  swiftep_combine_result_free(combined);
  swiftep_tensor_release(&rows);
  swiftep_handle_free(handle);
  swiftep_dispatch_result_free(result);
}

typedef struct {
  const Rank *rank;
  Input *input;
  swiftep_dispatch_result *result;
  swiftep_code code;
} Recorded;

static swiftep_code record_body(void *context) {
  Recorded *recorded = context;
  if (recorded->code == 0) recorded->result = dispatch(recorded->rank, &recorded->input->options);
  return recorded->code;
}

static pthread_barrier_t all_recorded;

static void check_graphs(Rank *rank) {
  Input input;
  fill(&input, rank->rank);
  input.options.sizing = SWIFTEP_WORST_CASE;
  input.options.is_asynchronous = 1;
  Recorded recorded = {.rank = rank, .input = &input, .code = 42};
  swiftep_graph *graph = (swiftep_graph *)1;
  swiftep_error *none = (swiftep_error *)1;
  CHECK(swiftep_graph_record(rank->buffer, record_body, &recorded, &graph, &none) == 42);
  CHECK(graph == NULL && none == NULL);
  FAIL(swiftep_graph_record(rank->buffer, NULL, NULL, &graph, &error), SWIFTEP_INVALID_ARGUMENT);
  recorded.code = 0;
  DO(swiftep_graph_record(rank->buffer, record_body, &recorded, &graph, &error));
  pthread_barrier_wait(&all_recorded);
  for (int run = 0; run < 3; run++) {
    for (int index = 0; index < TOKENS * HIDDEN; index++) input.values[index] = run + 1;
    swiftep_event *event;
    DO(swiftep_graph_launch(graph, 0, NULL, &event, &error));
    DO(swiftep_event_wait(event, &error));
    swiftep_event_free(event);
    swiftep_tensor rows = get(recorded.result, SWIFTEP_ROWS);
    CHECK(((const float *)rows.data)[0] == run + 1);
    swiftep_tensor_release(&rows);
    // The other rank may still read.
    pthread_barrier_wait(&all_recorded);
  }
  DO(swiftep_graph_launch(graph, 0, NULL, NULL, &error));
  // Ends what is under way, which uses the input.
  swiftep_buffer_close(rank->buffer);
  swiftep_graph_free(graph);
  swiftep_dispatch_result_free(recorded.result);
}

// MARK: Bad input

// One rank passes what cannot be used: both learn the same, and go on.
static void expect_of_all(const Rank *rank, const swiftep_dispatch_options *bad, const char *argument) {
  Input input;
  fill(&input, rank->rank);
  swiftep_dispatch_result *result = (swiftep_dispatch_result *)1;
  FAIL(
    swiftep_dispatch(rank->buffer, rank->rank == 1 ? bad : &input.options, &result, &error), SWIFTEP_INVALID_ARGUMENT,
    if (strcmp(error->argument, argument) != 0) fprintf(stderr, "%s\n", error->message);
    CHECK(error->rank == 1 && strcmp(error->argument, argument) == 0);
    CHECK(error->expected[0] != 0 && error->found[0] != 0 && error->step == NULL && error->cause == NULL));
  CHECK(result == NULL);
  swiftep_dispatch_result_free(dispatch(rank, &input.options));
}

static void check_bad_input(Rank *rank) {
  Input input;
#define BAD(argument, change)                      \
  do {                                             \
    fill(&input, rank->rank);                      \
    change;                                        \
    expect_of_all(rank, &input.options, argument); \
  } while (0)
  int64_t strides[2] = {2 * HIDDEN, 1}, transposed[2] = {1, TOKENS};
  BAD("x.strides[0]", input.x.strides = strides);
  BAD("indices.strides[1]", input.indices.strides = transposed);
  BAD("x", input.x.dtype = 0);
  BAD("x", input.x.dtype = 99);
  BAD("x", input.x.dtype = SWIFTEP_INT64);
  BAD("weights", input.weights_tensor.dtype = SWIFTEP_BF16);
  BAD("x", input.options.x = NULL);
  BAD("x", input.x.data = NULL);
  BAD("indices", input.options.indices = NULL);
  BAD("x", (input.x.device_type = SWIFTEP_CUDA, input.x.device_index = 3));
  BAD("x", input.x.device_type = 77);
  BAD("x", input.x.dimension_count = 1);
  BAD("indices.shape[0]", input.k_shape[0] = 3);
  BAD("indices[1, 0]", input.experts[2] = EXPERTS);
  BAD("layout", input.options.layout = 9);
  BAD("layout", input.options.layout = -1);
  BAD("sizing", input.options.sizing = 2);
  BAD("quantization", input.options.quantization = 5);
  BAD("waiting", input.options.waiting = 2);
  BAD("scale_order", input.options.scale_order = 2);
  BAD("workers", input.options.workers = -1);
  BAD("expert_alignment", input.options.expert_alignment = -1);
  BAD("global_scale", input.options.global_scale = 2);
  BAD("indices", input.options.table = &input.x);
  BAD("stream", input.options.uses_stream = 1);
  BAD("scales", input.options.scales = &input.x);
  swiftep_handle *handle;
  fill(&input, rank->rank);
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  handle = swiftep_dispatch_result_handle(result);
  BAD("indices", input.options.handle = handle);
  BAD("table", (input.options.handle = handle, input.options.indices = NULL, input.options.weights = NULL,
                input.options.table = &input.x));

  // Strides that say the same as none, also where there is a single element.
  int64_t dense[2] = {HIDDEN, 1}, dense_k[2] = {TOP_K, 1};
  fill(&input, rank->rank);
  input.x.strides = dense;
  input.indices.strides = dense_k;
  swiftep_dispatch_result_free(dispatch(rank, &input.options));

  // Combine.
  swiftep_tensor rows = get(result, SWIFTEP_ROWS);
  swiftep_combine_options options = {.size = sizeof options, .rows = &rows, .handle = handle};
  swiftep_combine_options bad = options;
  swiftep_combine_result *combined;
  swiftep_tensor strided = rows;
  strided.strides = strides;
  bad.rows = &strided;
  FAIL(
    swiftep_combine(rank->buffer, rank->rank == 1 ? &bad : &options, &combined, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(error->rank == 1 && strcmp(error->argument, "rows.strides[0]") == 0));
  bad = options;
  bad.bias_count = 3;
  bad.biases = (const swiftep_tensor *[]){&input.x, &input.x, &input.x};
  FAIL(
    swiftep_combine(rank->buffer, rank->rank == 1 ? &bad : &options, &combined, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(error->rank == 1 && strcmp(error->argument, "biases") == 0 && strcmp(error->found, "3") == 0));
  bad = options;
  bad.waiting = 3;
  FAIL(
    swiftep_combine(rank->buffer, rank->rank == 1 ? &bad : &options, &combined, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(error->rank == 1 && strcmp(error->argument, "waiting") == 0));
  swiftep_combine_result_free(combine(rank, &options));

  swiftep_dispatch_result_free(result);

  // Calls that do not belong together.
  fill(&input, rank->rank);
  input.options.layout = rank->rank;
  FAIL(
    swiftep_dispatch(rank->buffer, &input.options, &result, &error), SWIFTEP_RANKS_DISAGREE,
    CHECK(error->rank == 1 && strcmp(error->expected, "bySource") == 0 && strcmp(error->found, "byExpert") == 0));
  swiftep_tensor_release(&rows);
  swiftep_handle_free(handle);

  // What no peer is to learn of.
  FAIL(swiftep_dispatch(NULL, &input.options, &result, &error), SWIFTEP_INVALID_ARGUMENT);
  FAIL(swiftep_dispatch(rank->buffer, NULL, &result, &error), SWIFTEP_INVALID_ARGUMENT);
  FAIL(swiftep_dispatch(rank->buffer, &input.options, NULL, &error), SWIFTEP_INVALID_ARGUMENT);
  input.options.size = 0;
  FAIL(
    swiftep_dispatch(rank->buffer, &input.options, &result, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(strcmp(error->argument, "options.size") == 0));
  CHECK(swiftep_dispatch(rank->buffer, NULL, &result, NULL) == SWIFTEP_INVALID_ARGUMENT);
  FAIL(
    swiftep_buffer_mask(rank->buffer, 1, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(strcmp(error->argument, "plan.masking") == 0));

  swiftep_buffer_close(rank->buffer);
  swiftep_buffer_close(rank->buffer);
  fill(&input, rank->rank);
  FAIL(swiftep_dispatch(rank->buffer, &input.options, &result, &error), SWIFTEP_BUFFER_CLOSED);
}

static void check_missing(Rank *rank) {
  if (rank->rank == 1) return;
  Input input;
  fill(&input, rank->rank);
  swiftep_dispatch_result *result;
  FAIL(
    swiftep_dispatch(rank->buffer, &input.options, &result, &error), SWIFTEP_RANK_MISSING,
    CHECK(error->rank == 1 && strcmp(error->step, "exchange") == 0));
  FAIL(
    swiftep_dispatch(rank->buffer, &input.options, &result, &error), SWIFTEP_BUFFER_LOST,
    CHECK(error->rank == 1 && error->cause != NULL && error->cause->code == SWIFTEP_RANK_MISSING));
}

static void check_masks(Rank *rank) {
  uint64_t masked = 9;
  DO(swiftep_buffer_masked_ranks(rank->buffer, &masked, &error));
  CHECK(masked == 0);
  if (rank->rank == 1) {
    Input input;
    fill(&input, rank->rank);
    pthread_barrier_wait(&all_recorded);
    swiftep_dispatch_result *result;
    FAIL(
      swiftep_dispatch(rank->buffer, &input.options, &result, &error), SWIFTEP_RANK_MASKED,
      CHECK(error->rank == 1 && error->masking_rank == 0));
    DO(swiftep_buffer_unmask(rank->buffer, 2, &error));
  } else {
    FAIL(swiftep_buffer_mask(rank->buffer, 1, &error), SWIFTEP_INVALID_ARGUMENT);
    DO(swiftep_buffer_mask(rank->buffer, 2, &error));
    DO(swiftep_buffer_masked_ranks(rank->buffer, &masked, &error));
    CHECK(masked == 2);
    Input input;
    fill(&input, rank->rank);
    swiftep_dispatch_result *result = dispatch(rank, &input.options);
    CHECK(number(result, SWIFTEP_TOKENS_PER_SOURCE, 1) == 0 && number(result, SWIFTEP_TOKENS_PER_SOURCE, 0) == 3);
    CHECK(has(result, SWIFTEP_SOURCE_COUNTS));
    swiftep_dispatch_result_free(result);
    pthread_barrier_wait(&all_recorded);
    DO(swiftep_buffer_unmask(rank->buffer, 2, &error));
  }
  Input input;
  fill(&input, rank->rank);
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  CHECK(number(result, SWIFTEP_TOKENS_PER_SOURCE, 1) == 3);
  swiftep_dispatch_result_free(result);
}

// MARK: Plans

static void check_plans(void) {
  swiftep_plan *plan;
  DO(swiftep_plan_create(&plain, &plan, &error));
  int64_t sum = 0;
  for (int part = 0; part < swiftep_plan_part_count(plan); part++) {
    const char *name;
    sum += swiftep_plan_part(plan, part, &name);
    CHECK(name[0] != 0);
  }
  CHECK(sum == swiftep_plan_byte_count(plan) && sum > swiftep_plan_arena_byte_count(plan));
  CHECK(swiftep_plan_arena_byte_count_max(plan) >= 1 << 30 && swiftep_plan_rows_per_result(plan) == RANKS * TOKENS);
  const char *name;
  CHECK(swiftep_plan_part(plan, 1000, &name) == -1 && name == NULL);
  swiftep_plan_free(plan);

  // An older caller has no more than this; a newer one may have what is zero.
  swiftep_plan_options options = plain;
  options.size = offsetof(swiftep_plan_options, expert_owners);
  DO(swiftep_plan_create(&options, &plan, &error));
  swiftep_plan_free(plan);
  struct {
    swiftep_plan_options known;
    int64_t more;
  } newer = {.known = plain};
  newer.known.size = sizeof newer;
  DO(swiftep_plan_create(&newer.known, &plan, &error));
  swiftep_plan_free(plan);
  newer.more = 1;
  FAIL(
    swiftep_plan_create(&newer.known, &plan, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(strcmp(error->argument, "options.size") == 0 && error->rank == -1));
  CHECK(plan == NULL);

#define REFUSED(field, value, name)                                                                          \
  do {                                                                                                       \
    options = plain;                                                                                         \
    options.field = value;                                                                                   \
    FAIL(                                                                                                    \
      swiftep_plan_create(&options, &plan, &error), SWIFTEP_INVALID_ARGUMENT,                                \
      if (strcmp(error->argument, name) != 0) fprintf(stderr, "%s\n", error->message);                       \
      CHECK(strcmp(error->argument, name) == 0));                                                            \
  } while (0)
  REFUSED(hidden, 3, "hidden");
  REFUSED(dtype, 42, "dtype");
  REFUSED(scales, 9, "scales");
  REFUSED(layout, 3, "layout");
  REFUSED(masking, 3, "masking");
  REFUSED(rank_count, 0, "rank_count");
  REFUSED(result_count, -1, "result_count");
  REFUSED(sidecar_count, 2, "sidecar_byte_counts");
  int64_t negative = -1;
  REFUSED(received_tokens_max, &negative, "received_tokens_max");
  int32_t owners[EXPERTS] = {0, 1, 1, 1};
  options = plain;
  options.expert_owners = owners;
  DO(swiftep_plan_create(&options, &plan, &error));
  swiftep_plan_free(plan);
}

static void check_nothing(void) {
  swiftep_error_free(NULL);
  swiftep_tensor_release(NULL);
  swiftep_communicator_free(NULL);
  swiftep_plan_free(NULL);
  swiftep_buffer_close(NULL);
  swiftep_buffer_free(NULL);
  swiftep_event_free(NULL);
  swiftep_event_signal(NULL);
  swiftep_handle_free(NULL);
  swiftep_dispatch_result_free(NULL);
  swiftep_combine_result_free(NULL);
  swiftep_graph_free(NULL);
  swiftep_text_free(NULL);
  CHECK(swiftep_communicator_rank(NULL) == -1 && swiftep_buffer_rank(NULL) == -1);
  CHECK(swiftep_plan_byte_count(NULL) == -1 && swiftep_handle_token_count(NULL) == -1);
  CHECK(swiftep_dispatch_result_handle(NULL) == NULL && swiftep_combine_result_event(NULL) == NULL);
  FAIL(swiftep_event_wait(NULL, &error), SWIFTEP_INVALID_ARGUMENT);
  FAIL(swiftep_graph_launch(NULL, 0, NULL, NULL, &error), SWIFTEP_INVALID_ARGUMENT);
  FAIL(swiftep_communicators_of_threads(0, (swiftep_communicator *[1]){NULL}, &error), SWIFTEP_INVALID_ARGUMENT);
  CHECK(strchr(swiftep_version(), '.') != NULL);
  swiftep_event *event;
  swiftep_code code = swiftep_event_record(NULL, 1000, &event, NULL);
  CHECK(code == SWIFTEP_DRIVER || code == SWIFTEP_MACHINE_UNAVAILABLE);
}

// MARK: Processes

static int wire;

static int32_t gather(void *rank, const void *bytes, size_t byte_count, void *all) {
  int own = *(int *)rank;
  memcpy((char *)all + own * byte_count, bytes, byte_count);
  if (write(wire, bytes, byte_count) != (ssize_t)byte_count) return 1;
  char *other = (char *)all + (1 - own) * byte_count;
  for (size_t count = 0; count < byte_count;) {
    ssize_t more = read(wire, other + count, byte_count - count);
    if (more <= 0) return 2;
    count += (size_t)more;
  }
  return 0;
}

static int32_t fail_to_gather(void *context, const void *bytes, size_t byte_count, void *all) {
  (void)context, (void)bytes, (void)byte_count, (void)all;
  return 5;
}

static void run_process(int rank, swiftep_communicator *communicator) {
  CHECK(swiftep_communicator_rank(communicator) == rank);
  Job job = {communicator, &plain, 10000000000, check_round_trip};
  run_body(&job);
}

// Rank 1 ends, and rank 0 goes on alone.
static void by_gather(int rank) {
  swiftep_communicator *communicator, *next;
  FAIL(
    swiftep_communicator_of_processes(rank, 2, 0, fail_to_gather, NULL, &communicator, &error),
    SWIFTEP_RENDEZVOUS_FAILED, CHECK(strstr(error->message, "5") != NULL));
  FAIL(swiftep_communicator_of_processes(rank, 2, 0, NULL, NULL, &communicator, &error), SWIFTEP_INVALID_ARGUMENT);
  FAIL(swiftep_communicator_of_processes(rank, 2, -1, gather, &rank, &communicator, &error), SWIFTEP_INVALID_ARGUMENT);
  DO(swiftep_communicator_of_processes(rank, 2, 10000000000, gather, &rank, &communicator, &error));
  if (rank == 1) _exit(0);
  DO(swiftep_communicator_shrink(communicator, 10000000000, &next, &error));
  CHECK(swiftep_communicator_rank_count(next) == 1 && swiftep_communicator_generation(next) == 1);
  swiftep_communicator_free(communicator);
  swiftep_communicator_free(next);
}

static void by_gather_whole(int rank) {
  swiftep_communicator *communicator;
  DO(swiftep_communicator_of_processes(rank, 2, 10000000000, gather, &rank, &communicator, &error));
  run_process(rank, communicator);
}

static swiftep_meeting_point make_point(void) {
  return (swiftep_meeting_point){
    .size = sizeof(swiftep_meeting_point), .token = "a token of the checks' own", .job = "at a point"};
}

static void at_point(int rank) {
  swiftep_meeting_point point = make_point();
  swiftep_communicator *communicator;
  DO(swiftep_communicator_at(&point, rank, 2, 10000000000, &communicator, &error));
  run_process(rank, communicator);
  point.token = NULL;
  FAIL(swiftep_communicator_at(&point, rank, 2, 0, &communicator, &error), SWIFTEP_INVALID_ARGUMENT);
}

// A group of one takes in the other.
static void by_joining(int rank) {
  swiftep_meeting_point point = make_point();
  point.job = "joining";
  swiftep_communicator *communicator, *next;
  if (rank == 0) {
    DO(swiftep_communicator_at(&point, 0, 1, 10000000000, &communicator, &error));
    swiftep_error *refusal = (swiftep_error *)1;
    DO(swiftep_communicator_admit(communicator, 10000000000, NULL, NULL, &next, &refusal, &error));
    CHECK(refusal == NULL);
    swiftep_communicator_free(communicator);
  } else {
    DO(swiftep_communicator_join_at(&point, 10000000000, &next, &error));
  }
  run_process(rank, next);
}

static void by_environment(int rank) {
  swiftep_communicator *communicator;
  setenv("SWIFTEP_RANK", rank == 0 ? "0" : "1", 1);
  setenv("SWIFTEP_RANK_COUNT", "2", 1);
  FAIL(swiftep_communicator_from_environment(0, &communicator, &error), SWIFTEP_INVALID_ARGUMENT);
  setenv("SWIFTEP_TOKEN", "another token of the checks' own", 1);
  DO(swiftep_communicator_from_environment(10000000000, &communicator, &error));
  run_process(rank, communicator);
}

static void on_processes(void (*body)(int rank)) {
  int wires[2];
  pid_t processes[RANKS];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, wires) == 0);
  for (int rank = 0; rank < RANKS; rank++) {
    processes[rank] = fork();
    if (processes[rank] != 0) continue;
    wire = wires[rank];
    close(wires[1 - rank]);
    body(rank);
    exit(0);
  }
  for (int rank = 0; rank < RANKS; rank++) close(wires[rank]);
  for (int rank = 0; rank < RANKS; rank++) {
    int status;
    CHECK(waitpid(processes[rank], &status, 0) == processes[rank]);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

int main(void) {
  // Buffers are lost here on purpose.
  setenv("SWIFTEP_FLIGHT_RECORDER", "off", 1);
  // Before this process has threads.
  on_processes(by_gather);
  on_processes(by_gather_whole);
  on_processes(at_point);
  on_processes(by_joining);
  on_processes(by_environment);

  check_nothing();
  check_plans();
  pthread_barrier_init(&all_recorded, NULL, RANKS);
  on_threads(&plain, 0, check_round_trip);
  swiftep_plan_options options = plain;
  options.layout = SWIFTEP_BY_EXPERT;
  options.expert_alignment = 8;
  options.sidecar_byte_counts = (int64_t[]){4, 4};
  options.sidecar_count = 2;
  on_threads(&options, 0, check_formats);
  options = plain;
  options.tokens_per_rank_max = options.top_k = 1;
  options.expert_count = RANKS;
  options.hidden = 128;
  options.layout = SWIFTEP_GROUPED;
  options.dtype = SWIFTEP_BF16;
  options.combine_dtype = 0;
  on_threads(&options, 0, check_quantized);
  on_threads(&plain, 0, check_ownership);
  options = plain;
  options.is_staged = 0;
  options.arena_byte_count_max = 1;
  on_threads(&options, 0, check_in_place);
  on_threads(&plain, 0, check_halves);
  on_threads(&plain, 0, check_graphs);
  on_threads(&plain, 0, check_bad_input);
  on_threads(&plain, 100000000, check_missing);
  options = plain;
  options.masking = SWIFTEP_MASKING_MANUAL;
  on_threads(&options, 0, check_masks);
  pthread_barrier_destroy(&all_recorded);
  puts("the C ABI does what its header says");
  return 0;
}
