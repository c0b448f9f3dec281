// Two ranks, two experts on each, every token to its top two experts: Examples/FirstDispatch, in C.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <swiftep.h>

static swiftep_plan *plan;

static void check(swiftep_error *error) {
  if (error == NULL) return;
  fprintf(stderr, "%s\n", error->message);
  exit(1);
}

static void *run_rank(void *context) {
  swiftep_communicator *communicator = context;
  swiftep_error *error;
  swiftep_buffer *buffer;
  swiftep_buffer_create(communicator, plan, NULL, &buffer, &error);
  check(error);

  float ones[4 * 8];
  for (int i = 0; i < 4 * 8; i++) ones[i] = 1;
  int64_t experts[4 * 2] = {0, 2, 1, 0, 3, 2, 1, 3};
  int64_t x_shape[2] = {4, 8}, indices_shape[2] = {4, 2};
  swiftep_tensor x = {
    .size = sizeof x, .data = ones, .dtype = SWIFTEP_FP32, .dimension_count = 2, .shape = x_shape};
  swiftep_tensor indices = {
    .size = sizeof indices, .data = experts, .dtype = SWIFTEP_INT64, .dimension_count = 2, .shape = indices_shape};

  swiftep_dispatch_options dispatch = {.size = sizeof dispatch, .x = &x, .indices = &indices};
  swiftep_dispatch_result *received;
  swiftep_dispatch(buffer, &dispatch, &received, &error);
  check(error);
  swiftep_tensor rows = {.size = sizeof rows};
  swiftep_dispatch_result_tensor(received, SWIFTEP_ROWS, &rows);
  swiftep_handle *handle = swiftep_dispatch_result_handle(received);

  // The experts of this rank compute here, on rows.data, in place.
  swiftep_combine_options combine = {.size = sizeof combine, .rows = &rows, .handle = handle};
  swiftep_combine_result *combined;
  swiftep_combine(buffer, &combine, &combined, &error);
  check(error);
  swiftep_tensor y = {.size = sizeof y};
  swiftep_combine_result_tensor(combined, SWIFTEP_TOKENS, &y);
  printf(
    "rank %d: %d rows, first sum %.1f\n", swiftep_communicator_rank(communicator), (int)rows.shape[0],
    ((const float *)y.data)[0]);

  swiftep_tensor_release(&y);
  swiftep_tensor_release(&rows);
  swiftep_combine_result_free(combined);
  swiftep_handle_free(handle);
  swiftep_dispatch_result_free(received);
  swiftep_buffer_free(buffer);
  swiftep_communicator_free(communicator);
  return NULL;
}

int main(void) {
  swiftep_error *error;
  swiftep_plan_options options = {
    .size = sizeof options, .rank_count = 2, .tokens_per_rank_max = 4, .hidden = 8, .top_k = 2, .expert_count = 4};
  swiftep_plan_create(&options, &plan, &error);
  check(error);
  printf("%lld bytes a rank\n", (long long)swiftep_plan_byte_count(plan));

  swiftep_communicator *communicators[2];
  swiftep_communicators_of_threads(2, communicators, &error);
  check(error);
  pthread_t threads[2];
  for (int rank = 0; rank < 2; rank++) pthread_create(&threads[rank], NULL, run_rank, communicators[rank]);
  for (int rank = 0; rank < 2; rank++) pthread_join(threads[rank], NULL);
  swiftep_plan_free(plan);
  return 0;
}
