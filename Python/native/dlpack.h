/// The structures of DLPack 1.1, https://dmlc.github.io/dlpack/latest/c_api.html
#ifndef SWIFTEP_PYTHON_DLPACK_H
#define SWIFTEP_PYTHON_DLPACK_H

#include <stdint.h>

enum { DLPACK_CPU = 1, DLPACK_CUDA = 2, DLPACK_CUDA_HOST = 3 };
enum {
  DLPACK_INT = 0,
  DLPACK_UINT = 1,
  DLPACK_FLOAT = 2,
  DLPACK_BFLOAT = 4,
  DLPACK_BOOL = 6,
  DLPACK_FLOAT8_E4M3FN = 10,
  DLPACK_FLOAT4_E2M1FN = 17
};
enum { DLPACK_READ_ONLY = 1 };

typedef struct dlpack_tensor {
  void *data;
  int32_t device_type, device_index;
  int32_t dimension_count;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} dlpack_tensor;

typedef struct dlpack_managed {
  dlpack_tensor tensor;
  void *context;
  void (*deleter)(struct dlpack_managed *);
} dlpack_managed;

typedef struct dlpack_versioned {
  uint32_t major, minor;
  void *context;
  void (*deleter)(struct dlpack_versioned *);
  uint64_t flags;
  dlpack_tensor tensor;
} dlpack_versioned;

#define DLPACK_NAME "dltensor"
#define DLPACK_VERSIONED_NAME "dltensor_versioned"

#endif
