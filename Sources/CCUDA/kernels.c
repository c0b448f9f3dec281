#include "CCUDA.h"

#pragma clang diagnostic ignored "-Wc23-extensions"

static const char sm_80[] = {
#embed "PTX/sm_80.ptx" suffix(, 0)
};

static const char sm_90[] = {
#embed "PTX/sm_90.ptx" suffix(, 0)
};

const char *swiftep_kernels_sm_80(void) { return sm_80; }
const char *swiftep_kernels_sm_90(void) { return sm_90; }

_Static_assert(sizeof(struct swiftep_cu_launch_attribute) == 72, "CUlaunchAttribute has 72 bytes");
