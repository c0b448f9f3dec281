// What the C ABI promises beyond what the Swift library does, which has tests of its own: that every function and field
// means what the header says. Ranks are processes, then threads.
#include "ranks.h"

int main(void) {
  // Buffers are lost here on purpose.
  setenv("SWIFTEP_FLIGHT_RECORDER", "off", 1);
  // Before this process has threads.
  check_processes();

  check_nothing();
  check_plans();
  pthread_barrier_init(&all_ranks, NULL, RANKS);
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
  pthread_barrier_destroy(&all_ranks);
  puts("the C ABI does what its header says");
  return 0;
}
