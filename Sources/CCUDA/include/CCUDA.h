// The kernels as PTX, and the structs of the CUDA driver's API that the package passes to it. The driver itself is loaded at run time.

#ifndef SWIFTEP_CCUDA_H
#define SWIFTEP_CCUDA_H

#include <stdint.h>

// MARK: Kernels, made by scripts/build-kernels; the text of each ends with a zero byte

/// From sm_80 on: 16-byte loads and stores.
const char *swiftep_kernels_sm_80(void);
/// From sm_90 on: bulk copies.
const char *swiftep_kernels_sm_90(void);

// MARK: The driver's structs

struct swiftep_cu_location {
  int type;
  int id;
};

struct swiftep_cu_allocation {
  int type;
  int handle_types;
  struct swiftep_cu_location location;
  void *windows_metadata;
  struct {
    uint8_t compression;
    uint8_t direct_rdma;
    uint16_t usage;
    uint8_t reserved[4];
  } flags;
};

struct swiftep_cu_access {
  struct swiftep_cu_location location;
  int flags;
};

/// A stream's wait for a word: `CUstreamBatchMemOpParams`, as such an operation fills it.
struct swiftep_cu_wait {
  int operation;
  uint64_t address;
  uint64_t value;
  unsigned flags;
  uint64_t alias;
  uint64_t padding;
};

/// What a launch may do besides: `CUlaunchAttribute`, whose value is a number here.
struct swiftep_cu_launch_attribute {
  int kind;
  uint32_t padding;
  int value;
  uint8_t rest[60];
};

/// `CUlaunchConfig`.
struct swiftep_cu_launch {
  unsigned block_counts[3];
  unsigned thread_counts[3];
  unsigned shared_byte_count;
  void *stream;
  const struct swiftep_cu_launch_attribute *attributes;
  unsigned attribute_count;
};

#endif
