#define Py_LIMITED_API 0x03090000
#include <Python.h>

#include <pthread.h>
#include <stdlib.h>

#include "dlpack.h"
#include "private.h"

/// One of the two, and what it keeps.
typedef struct exported {
  union {
    dlpack_managed managed;
    dlpack_versioned versioned;
  };
  swiftep_tensor tensor;
  /// Of those in GPU memory.
  struct exported *next, **link;
  /// Then strides.
  int64_t shape[];
} exported;

/// What is exported of GPU memory, by address.
enum { BUCKET_COUNT = 1024 };
static exported *buckets[BUCKET_COUNT];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/// Memory is handed out in pages.
static exported **bucket_of(uintptr_t address) { return &buckets[(address >> 12) % BUCKET_COUNT]; }

static void list(exported *made) {
  exported **bucket = bucket_of((uintptr_t)made->tensor.data);
  pthread_mutex_lock(&lock);
  made->next = *bucket;
  made->link = bucket;
  if (made->next != NULL) made->next->link = &made->next;
  *bucket = made;
  pthread_mutex_unlock(&lock);
}

static void unlist(exported *made) {
  pthread_mutex_lock(&lock);
  *made->link = made->next;
  if (made->next != NULL) made->next->link = made->link;
  pthread_mutex_unlock(&lock);
}

swiftep_code swiftep_py_note_use(uintptr_t address, void *stream, swiftep_error **error) {
  swiftep_code code = SWIFTEP_OK;
  *error = NULL;
  pthread_mutex_lock(&lock);
  exported *found = *bucket_of(address);
  while (found != NULL && (uintptr_t)found->tensor.data != address) found = found->next;
  if (found != NULL) code = swiftep_tensor_note_use(&found->tensor, stream, error);
  pthread_mutex_unlock(&lock);
  return code;
}

static void delete(exported *made) {
  if (made->link != NULL) unlist(made);
  made->tensor.release(made->tensor.owner);
  free(made);
}

static void delete_managed(dlpack_managed *managed) { delete(managed->context); }
static void delete_versioned(dlpack_versioned *versioned) { delete(versioned->context); }

static void set_type(dlpack_tensor *tensor, int32_t dtype) {
  static const struct {
    uint8_t code, bits, lanes;
  } types[] = {
    [SWIFTEP_BF16] = {DLPACK_BFLOAT, 16, 1},
    [SWIFTEP_FP16] = {DLPACK_FLOAT, 16, 1},
    [SWIFTEP_FP32] = {DLPACK_FLOAT, 32, 1},
    [SWIFTEP_FP8_E4M3] = {DLPACK_FLOAT8_E4M3FN, 8, 1},
    [SWIFTEP_FP4_E2M1_X2] = {DLPACK_FLOAT4_E2M1FN, 4, 2},
    [SWIFTEP_UINT8] = {DLPACK_UINT, 8, 1},
    [SWIFTEP_INT32] = {DLPACK_INT, 32, 1},
    [SWIFTEP_INT64] = {DLPACK_INT, 64, 1},
  };
  tensor->type_code = types[dtype].code;
  tensor->bits = types[dtype].bits;
  tensor->lanes = types[dtype].lanes;
}

void *swiftep_py_export(const swiftep_tensor *tensor, int32_t dtype, int32_t is_versioned) {
  if (tensor->retain == NULL) return NULL;
  int32_t count = tensor->dimension_count;
  exported *made = calloc(1, sizeof *made + 2 * (size_t)count * sizeof made->shape[0]);
  if (made == NULL) return NULL;
  made->tensor = *tensor;
  int64_t *strides = made->shape + count;
  int64_t stride = 1;
  for (int32_t index = count - 1; index >= 0; index--) {
    made->shape[index] = tensor->shape[index];
    strides[index] = stride;
    stride *= tensor->shape[index];
  }
  dlpack_tensor *described;
  if (is_versioned) {
    made->versioned.major = 1;
    made->versioned.context = made;
    made->versioned.deleter = delete_versioned;
    described = &made->versioned.tensor;
  } else {
    made->managed.context = made;
    made->managed.deleter = delete_managed;
    described = &made->managed.tensor;
  }
  described->data = tensor->data;
  described->device_type = tensor->device_type == SWIFTEP_CUDA ? DLPACK_CUDA : DLPACK_CPU;
  described->device_index = tensor->device_index;
  described->dimension_count = count;
  described->shape = made->shape;
  described->strides = strides;
  set_type(described, dtype);
  tensor->retain(tensor->owner);
  if (tensor->device_type == SWIFTEP_CUDA) list(made);
  return made;
}

/// Who has taken the tensor out of a capsule has renamed it, and deletes the tensor.
static void destroy_managed(PyObject *capsule) {
  if (!PyCapsule_IsValid(capsule, DLPACK_NAME)) return;
  dlpack_managed *managed = PyCapsule_GetPointer(capsule, DLPACK_NAME);
  managed->deleter(managed);
}

static void destroy_versioned(PyObject *capsule) {
  if (!PyCapsule_IsValid(capsule, DLPACK_VERSIONED_NAME)) return;
  dlpack_versioned *versioned = PyCapsule_GetPointer(capsule, DLPACK_VERSIONED_NAME);
  versioned->deleter(versioned);
}

uintptr_t swiftep_py_capsule_name(int32_t is_versioned) {
  return (uintptr_t)(is_versioned ? DLPACK_VERSIONED_NAME : DLPACK_NAME);
}

uintptr_t swiftep_py_capsule_destructor(int32_t is_versioned) {
  return (uintptr_t)(is_versioned ? destroy_versioned : destroy_managed);
}
