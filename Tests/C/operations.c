#include "ranks.h"

#include <unistd.h>

void check_round_trip(Rank *rank) {
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
  for (int pair = 0; pair < 4; pair++) CHECK(number(result, SWIFTEP_TOKENS_PER_PAIR, pair) == 3);
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

void check_formats(Rank *rank) {
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

void check_quantized(Rank *rank) {
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

// MARK: Halves and graphs

void check_halves(Rank *rank) {
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

void check_graphs(Rank *rank) {
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
  pthread_barrier_wait(&all_ranks);
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
    pthread_barrier_wait(&all_ranks);
  }
  DO(swiftep_graph_launch(graph, 0, NULL, NULL, &error));
  // Ends what is under way, which uses the input.
  swiftep_buffer_close(rank->buffer);
  swiftep_graph_free(graph);
  swiftep_dispatch_result_free(recorded.result);
}
