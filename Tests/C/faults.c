#include "ranks.h"

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

void check_bad_input(Rank *rank) {
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
  BAD("rows_max", input.options.rows_max = 4);
  BAD("rows_max", (input.options.rows_max = -1, input.options.sizing = SWIFTEP_WORST_CASE));
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
  bad.encoding = 2;
  FAIL(
    swiftep_combine(rank->buffer, rank->rank == 1 ? &bad : &options, &combined, &error), SWIFTEP_INVALID_ARGUMENT,
    CHECK(error->rank == 1 && strcmp(error->argument, "encoding") == 0));
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

void check_missing(Rank *rank) {
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

void check_masks(Rank *rank) {
  uint64_t masked = 9;
  DO(swiftep_buffer_masked_ranks(rank->buffer, &masked, &error));
  CHECK(masked == 0);
  if (rank->rank == 1) {
    Input input;
    fill(&input, rank->rank);
    pthread_barrier_wait(&all_ranks);
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
    pthread_barrier_wait(&all_ranks);
    DO(swiftep_buffer_unmask(rank->buffer, 2, &error));
  }
  Input input;
  fill(&input, rank->rank);
  swiftep_dispatch_result *result = dispatch(rank, &input.options);
  CHECK(number(result, SWIFTEP_TOKENS_PER_SOURCE, 1) == 3);
  swiftep_dispatch_result_free(result);
}

// MARK: Plans

void check_plans(void) {
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

void check_nothing(void) {
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
