// A GPU's blocks of threads on a CPU: a lane is a thread, and `ptx.h` does what PTX would. Bulk copies take as long as they may: a load's bytes
// are there when its phase is waited for, a store reads its stage and writes when it is waited for, or never.

#ifndef SWIFTEP_EMULATED_H
#define SWIFTEP_EMULATED_H

#include <stdint.h>

/// Runs `body` on all lanes of one block after the other; no block waits for another. Returns NULL, or what a lane did that a GPU would not
/// do.
const char *emulated_launch(
    uint32_t block_count, uint32_t thread_count, uint32_t shared_byte_count, void (*body)(void *), void *context);

#endif
