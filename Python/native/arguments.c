#define Py_LIMITED_API 0x03090000
#include <Python.h>

#include "dlpack.h"
#include "private.h"

/// NumPy's `__array_struct__`, https://numpy.org/doc/stable/reference/arrays.interface.html
typedef struct array_interface {
  int two;
  int dimension_count;
  char kind;
  int byte_count;
  int flags;
  intptr_t *shape;
  intptr_t *byte_strides;
  void *data;
  PyObject *description;
} array_interface;

enum { ARRAY_CONTIGUOUS = 0x1, ARRAY_WRITABLE = 0x400 };

static const int32_t refused_dtype = -1;

/// No tensor has these.
static const int64_t refused_strides[64] = {
  -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
  -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
};

/// Strides in elements; those that are none, and those of more dimensions than anything is given with, are refused.
static const int64_t *element_strides(const array_interface *array, int64_t *strides) {
  if (array->flags & ARRAY_CONTIGUOUS) return NULL;
  if (array->dimension_count > 8 || array->byte_count == 0) return refused_strides;
  for (int index = 0; index < array->dimension_count; index++) {
    if (array->byte_strides[index] % array->byte_count != 0) return refused_strides;
    strides[index] = array->byte_strides[index] / array->byte_count;
  }
  return strides;
}

/// `tensor.dtype` is known: a NumPy array's does not follow from its kind alone.
static int read_array(const array_interface *array, swiftep_py_argument *argument) {
  swiftep_tensor *tensor = &argument->tensor;
  tensor->data = array->data;
  tensor->device_type = SWIFTEP_CPU;
  tensor->device_index = 0;
  tensor->dimension_count = array->dimension_count;
  _Static_assert(sizeof array->shape[0] == sizeof tensor->shape[0], "shapes are of 64-bit integers");
  tensor->shape = (const int64_t *)array->shape;
  tensor->strides = element_strides(array, argument->strides);
  return (array->flags & ARRAY_WRITABLE) != 0;
}

static int32_t dtype_of(const dlpack_tensor *given) {
  if (given->type_code == DLPACK_FLOAT4_E2M1FN && given->bits == 4 && given->lanes == 2) return SWIFTEP_FP4_E2M1_X2;
  if (given->lanes != 1) return refused_dtype;
  switch (given->type_code << 8 | given->bits) {
  case DLPACK_BFLOAT << 8 | 16: return SWIFTEP_BF16;
  case DLPACK_FLOAT << 8 | 16: return SWIFTEP_FP16;
  case DLPACK_FLOAT << 8 | 32: return SWIFTEP_FP32;
  case DLPACK_FLOAT8_E4M3FN << 8 | 8: return SWIFTEP_FP8_E4M3;
  case DLPACK_UINT << 8 | 8:
  case DLPACK_BOOL << 8 | 8: return SWIFTEP_UINT8;
  case DLPACK_INT << 8 | 32: return SWIFTEP_INT32;
  case DLPACK_INT << 8 | 64: return SWIFTEP_INT64;
  default: return refused_dtype;
  }
}

/// Rows without gaps, whatever is said of dimensions in which nobody takes a step.
static int is_contiguous(const dlpack_tensor *given) {
  if (given->strides == NULL) return 1;
  int64_t stride = 1;
  int is_whole = 1;
  for (int32_t index = given->dimension_count - 1; index >= 0; index--) {
    if (given->shape[index] == 0) return 1;
    if (given->shape[index] > 1 && given->strides[index] != stride) is_whole = 0;
    stride *= given->shape[index];
  }
  return is_whole;
}

static void read_dlpack(const dlpack_tensor *given, swiftep_py_argument *argument) {
  swiftep_tensor *tensor = &argument->tensor;
  tensor->data = (char *)given->data + given->byte_offset;
  tensor->dtype = dtype_of(given);
  switch (given->device_type) {
  case DLPACK_CPU:
  case DLPACK_CUDA_HOST: tensor->device_type = SWIFTEP_CPU; break;
  case DLPACK_CUDA: tensor->device_type = SWIFTEP_CUDA; break;
  // A device that nothing here knows.
  default: tensor->device_type = -given->device_type;
  }
  tensor->device_index = tensor->device_type == SWIFTEP_CPU ? 0 : given->device_index;
  tensor->dimension_count = given->dimension_count;
  tensor->shape = given->shape;
  tensor->strides = is_contiguous(given) ? NULL : given->strides;
}

/// Returns the tensor that the library is given, or NULL. Needs no lock of the interpreter's: the caller holds the capsule,
/// and what is asked of it cannot fail.
static const swiftep_tensor *described(swiftep_py_argument *argument, swiftep_py_owner *owner, int is_written) {
  swiftep_tensor *tensor = &argument->tensor;
  if (argument->capsule == 0 && tensor->size == 0) return NULL;
  tensor->size = sizeof *tensor;
  int is_writable = !argument->is_read_only;
  PyObject *capsule = (PyObject *)argument->capsule;
  if (capsule == NULL) {
  } else if (PyCapsule_IsValid(capsule, NULL)) {
    is_writable = read_array(PyCapsule_GetPointer(capsule, NULL), argument);
  } else if (PyCapsule_IsValid(capsule, DLPACK_NAME)) {
    read_dlpack(&((dlpack_managed *)PyCapsule_GetPointer(capsule, DLPACK_NAME))->tensor, argument);
  } else if (PyCapsule_IsValid(capsule, DLPACK_VERSIONED_NAME)) {
    const dlpack_versioned *given = PyCapsule_GetPointer(capsule, DLPACK_VERSIONED_NAME);
    if (given->major == 1) {
      read_dlpack(&given->tensor, argument);
      is_writable = (given->flags & DLPACK_READ_ONLY) == 0;
    } else {
      tensor->dtype = refused_dtype;
    }
  } else {
    tensor->dtype = refused_dtype;
  }
  argument->is_read_only = is_written && !is_writable;
  if (argument->is_read_only) tensor->dtype = refused_dtype;
  if (owner != NULL && tensor->retain == NULL) {
    tensor->owner = owner;
    tensor->retain = swiftep_py_owner_retain;
    tensor->release = swiftep_py_owner_release;
  }
  return tensor;
}

static const swiftep_tensor *const *described_each(
  swiftep_py_argument *arguments, int32_t count, const swiftep_tensor **tensors, swiftep_py_owner *owner
) {
  for (int32_t index = 0; index < count; index++) tensors[index] = described(&arguments[index], owner, 0);
  return tensors;
}

static void set(swiftep_py_argument *argument, uintptr_t capsule, int32_t dtype) {
  if (capsule == 0) return;
  argument->capsule = capsule;
  argument->tensor.dtype = dtype;
}

swiftep_code swiftep_py_dispatch(
  swiftep_buffer *buffer, swiftep_py_dispatch_call *call, uintptr_t x, int32_t x_dtype, uintptr_t indices,
  int32_t indices_dtype, uintptr_t weights, int32_t weights_dtype
) {
  set(&call->x, x, x_dtype);
  set(&call->indices, indices, indices_dtype);
  set(&call->weights, weights, weights_dtype);
  swiftep_dispatch_options *options = &call->options;
  options->size = sizeof *options;
  options->x = described(&call->x, call->owner, 0);
  options->scales = described(&call->scales, call->owner, 0);
  options->indices = described(&call->indices, call->owner, 0);
  options->weights = described(&call->weights, call->owner, 0);
  options->table = described(&call->table, call->owner, 0);
  options->expert_statistics = described(&call->expert_statistics, call->owner, 1);
  options->wait_statistics = described(&call->wait_statistics, call->owner, 1);
  options->sidecars = described_each(call->sidecars, options->sidecar_count, call->sidecar_tensors, call->owner);
  swiftep_code code = swiftep_dispatch(buffer, options, &call->result, &call->error);
  call->received = &call->received_rows;
  call->received->size = sizeof *call->received;
  if (code == SWIFTEP_OK) swiftep_dispatch_result_tensor(call->result, SWIFTEP_ROWS, call->received);
  return code;
}

void swiftep_py_dispatch_free(swiftep_py_dispatch_call *call) {
  swiftep_tensor_release(&call->received_rows);
  swiftep_dispatch_result_free(call->result);
}

swiftep_code swiftep_py_combine(
  swiftep_buffer *buffer, swiftep_py_combine_call *call, uintptr_t rows, int32_t rows_dtype
) {
  set(&call->rows, rows, rows_dtype);
  swiftep_combine_options *options = &call->options;
  options->size = sizeof *options;
  options->rows = described(&call->rows, call->owner, 0);
  options->row_weights = described(&call->row_weights, call->owner, 0);
  options->top_k_weights = described(&call->top_k_weights, call->owner, 0);
  options->biases = described_each(call->biases, options->bias_count, call->bias_tensors, call->owner);
  options->output = described(&call->output, call->owner, 1);
  options->wait_statistics = described(&call->wait_statistics, call->owner, 1);
  swiftep_code code = swiftep_combine(buffer, options, &call->result, &call->error);
  call->combined = &call->combined_tokens;
  call->combined->size = sizeof *call->combined;
  if (code == SWIFTEP_OK && options->output == NULL)
    swiftep_combine_result_tensor(call->result, SWIFTEP_TOKENS, call->combined);
  return code;
}

void swiftep_py_combine_free(swiftep_py_combine_call *call) {
  swiftep_tensor_release(&call->combined_tokens);
  swiftep_combine_result_free(call->result);
}
