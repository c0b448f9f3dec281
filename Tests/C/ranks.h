// Ranks of the checks of the C ABI, what they send, and calls that are to succeed or to fail.
#ifndef RANKS_H
#define RANKS_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <swiftep.h>

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

// What a rank does, with a buffer of the job's plan.
void run_body(const Job *job);
// Ranks that are threads of this process.
void on_threads(const swiftep_plan_options *options, swiftep_nanoseconds timeout, void (*body)(Rank *));
// Ranks that are threads, at the same point.
extern pthread_barrier_t all_ranks;

// MARK: Inputs

// Token t of rank r has 100 r + t in all channels, and goes to experts t and t + 1 of four.
typedef struct {
  float values[TOKENS * HIDDEN], weights[TOKENS * TOP_K];
  int64_t experts[TOKENS * TOP_K];
  int64_t x_shape[2], k_shape[2];
  swiftep_tensor x, indices, weights_tensor;
  swiftep_dispatch_options options;
} Input;

extern const swiftep_plan_options plain;

swiftep_tensor make_tensor(void *data, int32_t dtype, const int64_t *shape);
void fill(Input *input, int rank);

// MARK: Calls

swiftep_dispatch_result *dispatch(const Rank *rank, const swiftep_dispatch_options *options);
swiftep_combine_result *combine(const Rank *rank, const swiftep_combine_options *options);
// One of the result's tensors, which is there.
swiftep_tensor get(const swiftep_dispatch_result *result, int which);
// Whether the result has such a tensor.
int has(const swiftep_dispatch_result *result, int which);
// An element of an int32 tensor.
int32_t number(const swiftep_dispatch_result *result, int which, int index);
// What combine returns of rows that are as they came: each token, `times` times.
void check_sums(const swiftep_combine_result *result, int rank, float times);
// Experts 0 and 1 are rank 0's, 2 and 3 rank 1's: whether a token goes to both.
int is_split(int token);

// MARK: Checks

void check_round_trip(Rank *rank);
void check_formats(Rank *rank);
void check_quantized(Rank *rank);
void check_halves(Rank *rank);
void check_graphs(Rank *rank);
void check_ownership(Rank *rank);
void check_in_place(Rank *rank);
void check_bad_input(Rank *rank);
void check_missing(Rank *rank);
void check_masks(Rank *rank);
void check_plans(void);
void check_nothing(void);
void check_processes(void);

#endif
