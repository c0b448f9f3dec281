#include "CPlatform.h"

#include <string.h>

// Sanitizers see neither memcpy's inner accesses nor streaming stores: there, rows are copied in plain pieces of 16
// bytes.
#define SANITIZED (__has_feature(thread_sanitizer) || __has_feature(address_sanitizer))

#define INLINE static inline __attribute__((always_inline))

typedef uint32_t piece __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint32_t aligned_piece __attribute__((vector_size(16), may_alias));

/// Bytes of a row that are written to one destination before the next is served: they stay in the first-level cache.
enum { CHUNK = 4096 };

static void copy_streaming(void *destination, const void *source, size_t byte_count) {
  const piece *from = source;
  aligned_piece *to = destination;
  for (size_t i = 0; i < byte_count / 16; i++) {
    if (SANITIZED) {
      to[i] = from[i];
    } else {
      __builtin_nontemporal_store((aligned_piece)from[i], &to[i]);
    }
  }
}

static void copy_cached(void *destination, const void *source, size_t byte_count) {
  if (SANITIZED) {
    copy_streaming(destination, source, byte_count);
  } else {
    memcpy(destination, source, byte_count);
  }
}

void swiftep_scatter(void *const *destinations, int destination_count, const void *source, size_t byte_count, bool streaming) {
  for (size_t first = 0; first < byte_count; first += CHUNK) {
    size_t count = byte_count - first < CHUNK ? byte_count - first : CHUNK;
    for (int d = 0; d < destination_count; d++) {
      char *to = (char *)destinations[d] + first;
      const char *from = (const char *)source + first;
      if (streaming) {
        copy_streaming(to, from, count);
      } else {
        copy_cached(to, from, count);
      }
    }
  }
}

void swiftep_store_fence(void) {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#elif defined(__aarch64__)
  __asm__ volatile("dmb ishst" ::: "memory");
#endif
}

// Every function below that takes or returns a wide vector is inlined, so no calling convention is at stake.
#pragma clang diagnostic ignored "-Wpsabi"

// MARK: Formats, eight elements at a time

// Products and sums stand in statements of their own, and no target below has fused multiply-add: nothing is
// contracted.

typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

INLINE u32x8 select_bits(i32x8 mask, u32x8 yes, u32x8 no) { return ((u32x8)mask & yes) | (~(u32x8)mask & no); }

INLINE u16x8 load_u16(const void *from) {
  u16x8 bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

INLINE f32x8 widen_bf16(u16x8 bits) { return (f32x8)(__builtin_convertvector(bits, u32x8) << 16); }

INLINE u16x8 narrow_bf16(f32x8 value) {
  u32x8 bits = (u32x8)value;
  u32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  i32x8 is_nan = (i32x8)((bits & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector(select_bits(is_nan, (u32x8){} + 0x7fff, rounded), u16x8);
}

INLINE f32x8 widen_fp16(u16x8 half) {
  u32x8 bits = __builtin_convertvector(half, u32x8);
  u32x8 magnitude = (u32x8)((f32x8)((bits & 0x7fff) << 13) * 0x1p112f);
  i32x8 is_special = (i32x8)((bits & 0x7c00) == 0x7c00);
  magnitude |= (u32x8)is_special & 0x7f800000;
  return (f32x8)(magnitude | ((bits & 0x8000) << 16));
}

INLINE u16x8 narrow_fp16(f32x8 value) {
  u32x8 bits = (u32x8)value;
  u32x8 magnitude = bits & 0x7fffffff;
  u32x8 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  u32x8 subnormal = (u32x8)((f32x8)magnitude + 0.5f) - 0x3f000000;
  u32x8 half = select_bits((i32x8)(magnitude < 0x38800000), subnormal, normal);
  half = select_bits((i32x8)(magnitude >= 0x47800000), (u32x8){} + 0x7c00, half) | ((bits >> 16) & 0x8000);
  half = select_bits((i32x8)(magnitude > 0x7f800000), (u32x8){} + 0x7fff, half);
  return __builtin_convertvector(half, u16x8);
}

INLINE u8x8 narrow_e4m3(f32x8 value) {
  u32x8 bits = (u32x8)value;
  u32x8 magnitude = bits & 0x7fffffff;
  u32x8 normal = (magnitude + 0x7ffff + ((magnitude >> 20) & 1) - (120u << 23)) >> 20;
  u32x8 subnormal = (u32x8)((f32x8)magnitude + 0x1p14f) - 0x46800000;
  u32x8 code = select_bits((i32x8)(magnitude < 0x3c800000), subnormal, normal);
  code = select_bits((i32x8)(magnitude >= 0x43e00000), (u32x8){} + 0x7e, code) | ((bits >> 24) & 0x80);
  code = select_bits((i32x8)(magnitude > 0x7f800000), (u32x8){} + 0x7f, code);
  return __builtin_convertvector(code, u8x8);
}

// MARK: Reduction

INLINE size_t element_size(int format) { return format == SWIFTEP_FP32 ? 4 : 2; }

INLINE f32x8 load_row(int format, const void *row, size_t index) {
  const char *from = (const char *)row + index * element_size(format);
  if (format == SWIFTEP_FP32) {
    f32x8 value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  return format == SWIFTEP_BF16 ? widen_bf16(load_u16(from)) : widen_fp16(load_u16(from));
}

INLINE void store_row(int format, void *row, size_t index, f32x8 value, bool streaming) {
  char *to = (char *)row + index * element_size(format);
  if (format == SWIFTEP_FP32) {
    u32x8 bits = select_bits((i32x8)(value != value), (u32x8){} + 0x7fffffff, (u32x8)value);
    aligned_piece halves[2];
    memcpy(halves, &bits, sizeof bits);
    if (streaming && !SANITIZED) {
      __builtin_nontemporal_store(halves[0], (aligned_piece *)to);
      __builtin_nontemporal_store(halves[1], (aligned_piece *)to + 1);
      return;
    }
    memcpy(to, halves, sizeof halves);
    return;
  }
  u16x8 bits = format == SWIFTEP_BF16 ? narrow_bf16(value) : narrow_fp16(value);
  if (streaming && !SANITIZED) {
    __builtin_nontemporal_store((aligned_piece)bits, (aligned_piece *)to);
    return;
  }
  memcpy(to, &bits, sizeof bits);
}

/// How far ahead of the sum its rows are fetched.
enum { PREFETCH = 4096 };

/// Elements `first` and up, `8 * vectors` of them; `vectors` is a compile-time constant.
INLINE void reduce_block(
    int format, void *output, const struct swiftep_reduction *r, bool is_weighted, size_t first, int vectors, bool streaming) {
  f32x8 sums[4] = {};
  for (int s = 0; s < r->row_count; s++) {
    __builtin_prefetch((const char *)r->rows[s] + first * element_size(format) + PREFETCH);
    if (format == SWIFTEP_FP32) __builtin_prefetch((const char *)r->rows[s] + first * 4 + PREFETCH + 64);
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) {
      f32x8 value = load_row(format, r->rows[s], first + 8 * v);
      if (is_weighted) value *= r->weights[s];
      sums[v] += value;
    }
  }
  const void *biases[2] = {r->bias0, r->bias1};
  for (int b = 0; b < 2; b++) {
    if (!biases[b]) continue;
#pragma clang loop unroll(full)
    for (int v = 0; v < vectors; v++) sums[v] += load_row(format, biases[b], first + 8 * v);
  }
#pragma clang loop unroll(full)
  for (int v = 0; v < vectors; v++) store_row(format, output, first + 8 * v, sums[v], streaming);
}

/// The last, fewer than eight elements: the same arithmetic on padded copies.
INLINE void reduce_tail(int format, void *output, const struct swiftep_reduction *r, size_t first, size_t count) {
  f32x8 sum = {};
  size_t size = element_size(format);
  for (int s = 0; s < r->row_count + 2; s++) {
    const void *row = s < r->row_count ? r->rows[s] : s == r->row_count ? r->bias0 : r->bias1;
    if (!row) continue;
    char padded[32] = {};
    memcpy(padded, (const char *)row + first * size, count * size);
    f32x8 value = load_row(format, padded, 0);
    if (s < r->row_count && r->weights) value *= r->weights[s];
    sum += value;
  }
  char padded[32];
  store_row(format, padded, 0, sum, false);
  memcpy((char *)output + first * size, padded, count * size);
}

INLINE void reduce_format(int format, void *output, const struct swiftep_reduction *r, size_t first, size_t count, bool streaming) {
  size_t end = first + count;
  streaming = streaming && ((uintptr_t)output + first * element_size(format)) % 16 == 0;
  if (r->weights) {
    for (; first + 32 <= end; first += 32) reduce_block(format, output, r, true, first, 4, streaming);
    for (; first + 8 <= end; first += 8) reduce_block(format, output, r, true, first, 1, streaming);
  } else {
    for (; first + 32 <= end; first += 32) reduce_block(format, output, r, false, first, 4, streaming);
    for (; first + 8 <= end; first += 8) reduce_block(format, output, r, false, first, 1, streaming);
  }
  if (first < end) reduce_tail(format, output, r, first, end - first);
}

INLINE void reduce_any(void *output, const struct swiftep_reduction *r, size_t first, size_t count, bool streaming) {
  switch (r->format) {
  case SWIFTEP_BF16: reduce_format(SWIFTEP_BF16, output, r, first, count, streaming); break;
  case SWIFTEP_FP16: reduce_format(SWIFTEP_FP16, output, r, first, count, streaming); break;
  default: reduce_format(SWIFTEP_FP32, output, r, first, count, streaming); break;
  }
}

// MARK: Quantization

INLINE void quantize_any(uint8_t *values, void *scales, const uint16_t *source, size_t channel_count, bool power_of_two) {
  for (size_t first = 0, block = 0; first < channel_count; first += 128, block++) {
    size_t count = channel_count - first < 128 ? channel_count - first : 128;
    u16x8 largest = {};
    for (size_t i = 0; i < count; i += 8) {
      u16x8 magnitude = load_u16(source + first + i) & 0x7fff;
      u16x8 is_larger = (u16x8)(magnitude > largest);
      largest = (is_larger & magnitude) | (~is_larger & largest);
    }
    uint16_t top = 0;
    for (int lane = 0; lane < 8; lane++) top = largest[lane] > top ? largest[lane] : top;
    uint32_t amax_bits = (uint32_t)top << 16;
    float amax;
    memcpy(&amax, &amax_bits, sizeof amax);
    if (amax < 1e-4f) amax = 1e-4f;
    float scale = amax / 448.0f;
    float inverse = 448.0f / amax;
    if (power_of_two) {
      uint32_t bits;
      memcpy(&bits, &scale, sizeof bits);
      uint32_t exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);
      if (top >= 0x7f80) exponent = 255;
      uint32_t inverse_bits = exponent == 255 ? 0x7fc00000 : (254 - exponent) << 23;
      memcpy(&inverse, &inverse_bits, sizeof inverse);
      ((uint8_t *)scales)[block] = (uint8_t)exponent;
    } else {
      ((float *)scales)[block] = scale;
    }
    for (size_t i = 0; i < count; i += 8) {
      u8x8 codes = narrow_e4m3(widen_bf16(load_u16(source + first + i)) * inverse);
      memcpy(values + first + i, &codes, sizeof codes);
    }
  }
}

// MARK: One function, two instruction sets

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
AVX2 static void reduce_avx2(void *output, const struct swiftep_reduction *r, size_t first, size_t count, bool streaming) {
  reduce_any(output, r, first, count, streaming);
}
AVX2 static void quantize_avx2(uint8_t *values, void *scales, const uint16_t *source, size_t channel_count, bool power_of_two) {
  quantize_any(values, scales, source, channel_count, power_of_two);
}
#define HAS_AVX2 __builtin_cpu_supports("avx2")
#else
#define HAS_AVX2 0
#define reduce_avx2 reduce_any
#define quantize_avx2 quantize_any
#endif

void swiftep_reduce(void *output, const struct swiftep_reduction *reduction, size_t first, size_t element_count, bool streaming) {
  if (HAS_AVX2) {
    reduce_avx2(output, reduction, first, element_count, streaming);
  } else {
    reduce_any(output, reduction, first, element_count, streaming);
  }
}

void swiftep_quantize_e4m3(uint8_t *values, void *scales, const uint16_t *source, size_t channel_count, bool power_of_two) {
  if (HAS_AVX2) {
    quantize_avx2(values, scales, source, channel_count, power_of_two);
  } else {
    quantize_any(values, scales, source, channel_count, power_of_two);
  }
}
