/// What the package adds to the library in C: arguments that are read without a Python object per field, memory that calls
/// keep in use, and DLPack.
#ifndef SWIFTEP_PYTHON_H
#define SWIFTEP_PYTHON_H

#include "swiftep.h"

// MARK: Memory that calls keep in use

/// Counts who uses the Python objects that are registered under a key. Made with one use, the caller's.
typedef struct swiftep_py_owner swiftep_py_owner;

swiftep_py_owner *swiftep_py_owner_create(uint64_t key);
/// Ends a use. With the last one, the key is to be had from `swiftep_py_next_unused`.
void swiftep_py_owner_release(void *owner);
/// A key whose objects nobody uses any more; 0: none.
uint64_t swiftep_py_next_unused(void);
/// From now on, nothing calls Python any more. Returns when nothing does.
void swiftep_py_stop(void);

// MARK: Arguments

/// A tensor that a call is given. All zero: none.
typedef struct swiftep_py_argument {
  /// Complete where `capsule` is 0.
  swiftep_tensor tensor;
  /// The address of a capsule, NumPy's `__array_struct__` or DLPack's, which has what `tensor` has not. Who makes the call
  /// holds it.
  uintptr_t capsule;
  /// Set where the library is to write, and the memory is read-only: the call was made with an element type that is refused.
  int32_t is_read_only;
  int64_t shape[8], strides[8];
} swiftep_py_argument;

/// A dispatch, and what it has returned.
typedef struct swiftep_py_dispatch_call {
  swiftep_dispatch_options options;
  swiftep_py_argument x, scales, indices, weights, table, expert_statistics, wait_statistics;
  /// `options.sidecar_count` of each.
  swiftep_py_argument *sidecars;
  const swiftep_tensor **sidecar_tensors;
  /// Of what is given that has no owner; NULL: nothing is kept in use.
  swiftep_py_owner *owner;
  swiftep_dispatch_result *result;
  /// `received_rows`, by an address that costs nothing to read.
  swiftep_tensor *received;
  swiftep_tensor received_rows;
  swiftep_error *error;
} swiftep_py_dispatch_call;

/// The capsules and element types of the arguments that most calls have, which cost less here than in the struct; 0: what is
/// in the struct.
swiftep_code swiftep_py_dispatch(
  swiftep_buffer *buffer, swiftep_py_dispatch_call *call, uintptr_t x, int32_t x_dtype, uintptr_t indices,
  int32_t indices_dtype, uintptr_t weights, int32_t weights_dtype);
/// Lets go of what the call has returned.
void swiftep_py_dispatch_free(swiftep_py_dispatch_call *call);

/// A combine, and what it has returned.
typedef struct swiftep_py_combine_call {
  swiftep_combine_options options;
  swiftep_py_argument rows, row_weights, top_k_weights, output, wait_statistics;
  /// `options.bias_count` of each.
  swiftep_py_argument *biases;
  const swiftep_tensor **bias_tensors;
  swiftep_py_owner *owner;
  swiftep_combine_result *result;
  /// `combined_tokens`, there without `output`.
  swiftep_tensor *combined;
  swiftep_tensor combined_tokens;
  swiftep_error *error;
} swiftep_py_combine_call;

swiftep_code swiftep_py_combine(
  swiftep_buffer *buffer, swiftep_py_combine_call *call, uintptr_t rows, int32_t rows_dtype);
void swiftep_py_combine_free(swiftep_py_combine_call *call);

// MARK: DLPack

/// What a capsule holds: a `DLManagedTensor`, or its successor with a version. Keeps the tensor's memory until it is deleted.
/// `dtype` is what its elements are called there. NULL where there is no memory, or the tensor has no owner.
void *swiftep_py_export(const swiftep_tensor *tensor, int32_t dtype, int32_t is_versioned);
/// The stream uses the GPU memory that has been exported at an address; where there is none such, nothing happens.
swiftep_code swiftep_py_note_use(uintptr_t address, void *stream, swiftep_error **error);
/// A capsule's name and destructor, as PyCapsule_New takes them.
uintptr_t swiftep_py_capsule_name(int32_t is_versioned);
uintptr_t swiftep_py_capsule_destructor(int32_t is_versioned);

// MARK: Memory for PyTorch

/// What `swiftep_py_allocate` and `swiftep_py_free`, which PyTorch finds by their names, take this thread's memory from; NULL:
/// nothing.
void swiftep_py_allocate_from(swiftep_buffer *buffer);

#endif
