#include "ranks.h"

#include <unistd.h>

static void count_retain(void *count) { __atomic_add_fetch((int *)count, 1, __ATOMIC_SEQ_CST); }
static void count_release(void *count) { __atomic_sub_fetch((int *)count, 1, __ATOMIC_SEQ_CST); }

void check_ownership(Rank *rank) {
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
void check_in_place(Rank *rank) {
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
  CHECK(swiftep_buffer_local_expert_count(rank->buffer) == EXPERTS / RANKS);
  CHECK(swiftep_buffer_worst_case_row_count(rank->buffer, SWIFTEP_BY_SOURCE, TOP_K, 1) == RANKS * TOKENS);
  CHECK(swiftep_buffer_worst_case_row_count(rank->buffer, SWIFTEP_GROUPED, TOP_K, 1) == RANKS * TOKENS);
  CHECK(swiftep_buffer_worst_case_row_count(rank->buffer, 7, TOP_K, 1) == -1);
  CHECK(swiftep_buffer_worst_case_row_count(NULL, SWIFTEP_BY_SOURCE, TOP_K, 1) == -1);

  // Memory that the caller divides.
  int64_t pool_shape[1] = {7 * HIDDEN}, part_shape[2] = {6, HIDDEN};
  swiftep_tensor pool = {.size = sizeof pool};
  DO(swiftep_buffer_make_arena_tensor(rank->buffer, SWIFTEP_FP32, 1, pool_shape, &pool, &error));
  swiftep_tensor part = make_tensor((float *)pool.data + HIDDEN, SWIFTEP_FP32, part_shape);
  for (int index = 0; index < 6 * HIDDEN; index++) ((float *)part.data)[index] = 0.25f;
  options.rows = &part;
  combined = combine(rank, &options);
  CHECK(swiftep_combine_result_tensor(combined, SWIFTEP_TOKENS, &tokens) == 1);
  CHECK(((const float *)tokens.data)[0] == 0.25f && ((const float *)tokens.data)[HIDDEN] == 0.5f);
  swiftep_tensor_release(&tokens);
  swiftep_combine_result_free(combined);
  swiftep_tensor_release(&pool);
  CHECK(swiftep_buffer_arena_byte_count(rank->buffer) == byte_count);
  pool_shape[0] = 1 << 28;
  FAIL(
    swiftep_buffer_make_arena_tensor(rank->buffer, SWIFTEP_FP32, 1, pool_shape, &pool, &error), SWIFTEP_OUT_OF_MEMORY);

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
