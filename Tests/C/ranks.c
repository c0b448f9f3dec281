#include "ranks.h"

pthread_barrier_t all_ranks;

void run_body(const Job *job) {
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

void on_threads(const swiftep_plan_options *options, swiftep_nanoseconds timeout, void (*body)(Rank *)) {
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

swiftep_tensor make_tensor(void *data, int32_t dtype, const int64_t *shape) {
  return (swiftep_tensor){
    .size = sizeof(swiftep_tensor), .data = data, .dtype = dtype, .dimension_count = 2, .shape = shape};
}

void fill(Input *input, int rank) {
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

const swiftep_plan_options plain = {
  .size = sizeof plain, .rank_count = RANKS, .tokens_per_rank_max = TOKENS, .hidden = HIDDEN, .top_k = TOP_K,
  .expert_count = EXPERTS, .dtype = SWIFTEP_FP32, .combine_dtype = SWIFTEP_FP32, .result_count = 2, .is_staged = 1};

swiftep_tensor get(const swiftep_dispatch_result *result, int which) {
  swiftep_tensor tensor = {.size = sizeof tensor};
  CHECK(swiftep_dispatch_result_tensor(result, which, &tensor) == 1);
  CHECK(tensor.retain != NULL && tensor.release != NULL && tensor.device_type == SWIFTEP_CPU);
  return tensor;
}

int has(const swiftep_dispatch_result *result, int which) {
  swiftep_tensor tensor = {.size = sizeof tensor, .data = &tensor};
  int found = swiftep_dispatch_result_tensor(result, which, &tensor);
  CHECK(found || (tensor.data == NULL && tensor.size == sizeof tensor));
  swiftep_tensor_release(&tensor);
  CHECK(tensor.data == NULL && tensor.release == NULL && tensor.size == sizeof tensor);
  return found;
}

int32_t number(const swiftep_dispatch_result *result, int which, int index) {
  swiftep_tensor tensor = get(result, which);
  CHECK(tensor.dtype == SWIFTEP_INT32);
  int32_t found = ((const int32_t *)tensor.data)[index];
  swiftep_tensor_release(&tensor);
  return found;
}

void check_sums(const swiftep_combine_result *result, int rank, float times) {
  swiftep_tensor tokens = {.size = sizeof tokens};
  CHECK(swiftep_combine_result_tensor(result, SWIFTEP_TOKENS, &tokens) == 1);
  CHECK(tokens.dtype == SWIFTEP_FP32 && tokens.dimension_count == 2);
  CHECK(tokens.shape[0] == TOKENS && tokens.shape[1] == HIDDEN);
  for (int index = 0; index < TOKENS * HIDDEN; index++) {
    CHECK(((const float *)tokens.data)[index] == times * (100 * rank + index / HIDDEN));
  }
  swiftep_tensor_release(&tokens);
}

int is_split(int token) { return token % 2; }

swiftep_dispatch_result *dispatch(const Rank *rank, const swiftep_dispatch_options *options) {
  swiftep_dispatch_result *result;
  DO(swiftep_dispatch(rank->buffer, options, &result, &error));
  return result;
}

swiftep_combine_result *combine(const Rank *rank, const swiftep_combine_options *options) {
  swiftep_combine_result *result;
  DO(swiftep_combine(rank->buffer, options, &result, &error));
  return result;
}
