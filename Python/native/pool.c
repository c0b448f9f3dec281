#include <pthread.h>
#include <stdlib.h>
#include <sys/types.h>

#include "private.h"

/// The buffer whose arena this thread allocates from.
static _Thread_local swiftep_buffer *current;

void swiftep_py_allocate_from(swiftep_buffer *buffer) { current = buffer; }

/// What has been allocated, which is few: pieces of megabytes, that PyTorch divides.
typedef struct piece {
  swiftep_tensor tensor;
  struct piece *next;
} piece;

static piece *pieces;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/// As PyTorch's `CUDAPluggableAllocator` calls it. NULL where there is no memory.
__attribute__((visibility("default"))) void *swiftep_py_allocate(ssize_t byte_count, int device, void *stream) {
  (void)device;
  piece *made = current == NULL ? NULL : calloc(1, sizeof *made);
  if (made == NULL) return NULL;
  made->tensor.size = sizeof made->tensor;
  int64_t shape = byte_count;
  if (
    swiftep_buffer_make_arena_tensor(current, SWIFTEP_UINT8, 1, &shape, &made->tensor, NULL) != SWIFTEP_OK
    || swiftep_tensor_note_use(&made->tensor, stream, NULL) != SWIFTEP_OK) {
    swiftep_tensor_release(&made->tensor);
    free(made);
    return NULL;
  }
  pthread_mutex_lock(&lock);
  made->next = pieces;
  pieces = made;
  pthread_mutex_unlock(&lock);
  return made->tensor.data;
}

__attribute__((visibility("default"))) void swiftep_py_free(void *data, ssize_t byte_count, int device, void *stream) {
  (void)byte_count, (void)device;
  pthread_mutex_lock(&lock);
  piece **link = &pieces;
  while (*link != NULL && (*link)->tensor.data != data) link = &(*link)->next;
  piece *found = *link;
  if (found != NULL) *link = found->next;
  pthread_mutex_unlock(&lock);
  if (found == NULL) return;
  swiftep_tensor_note_use(&found->tensor, stream, NULL);
  swiftep_tensor_release(&found->tensor);
  free(found);
}
