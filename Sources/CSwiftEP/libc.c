#include "swiftep.h"

#include <math.h>

// The Swift runtime has a wrapper of this function, which nothing here calls: linked with libm's, the library would need
// glibc 2.35.
__attribute__((visibility("hidden"))) float hypotf(float x, float y) {
  return (float)sqrt((double)x * x + (double)y * y);
}
