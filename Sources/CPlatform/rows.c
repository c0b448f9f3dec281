#include "CPlatform.h"

#include <string.h>

// Sanitizers see neither memcpy's inner accesses nor streaming stores: there, rows are copied in plain pieces of 16
// bytes.
#define SANITIZED (__has_feature(thread_sanitizer) || __has_feature(address_sanitizer))

#define INLINE static inline __attribute__((always_inline))

// Every function below that takes or returns a wide vector is inlined, so no calling convention is at stake.
#pragma clang diagnostic ignored "-Wpsabi"

typedef uint32_t aligned_piece __attribute__((vector_size(16), may_alias));
typedef uint32_t piece __attribute__((vector_size(16), may_alias, aligned(1)));

// MARK: Copies

/// Bytes of a row that are written to one destination before the next is served: they stay in the first-level cache.
enum { CHUNK = 4096 };

typedef uint32_t u32x8 __attribute__((vector_size(32)));

INLINE u32x8 load_lanes(const void *from) {
  u32x8 lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

INLINE void store_lanes(void *to, u32x8 lanes, bool streaming) {
  aligned_piece halves[2];
  memcpy(halves, &lanes, sizeof lanes);
  if (SANITIZED) {
    ((piece *)to)[0] = halves[0];
    ((piece *)to)[1] = halves[1];
  } else if (streaming) {
    __builtin_nontemporal_store(halves[0], (aligned_piece *)to);
    __builtin_nontemporal_store(halves[1], (aligned_piece *)to + 1);
  } else {
    memcpy(to, &lanes, sizeof lanes);
  }
}

/// Copies part of a row. A loop of our own, because the C library's memcpy switches to string instructions at this size, which
/// fetch nothing ahead: in the caches they take up to twice as long.
INLINE void copy_chunk(char *to, const char *from, size_t byte_count, bool streaming) {
  size_t i = 0;
  for (; i + 64 <= byte_count; i += 64) {
    __builtin_prefetch(from + i + 2048);
    if (!streaming) __builtin_prefetch(to + i + 1024, 1);
    store_lanes(to + i, load_lanes(from + i), streaming);
    store_lanes(to + i + 32, load_lanes(from + i + 32), streaming);
  }
  for (; i < byte_count; i += 16) {
    *(piece *)(to + i) = *(const piece *)(from + i);
  }
}

INLINE void scatter_any(
    void *const *destinations, int destination_count, const void *source, size_t byte_count, bool streaming) {
  for (size_t first = 0; first < byte_count; first += CHUNK) {
    size_t count = byte_count - first < CHUNK ? byte_count - first : CHUNK;
    for (int d = 0; d < destination_count; d++) {
      copy_chunk((char *)destinations[d] + first, (const char *)source + first, count, streaming);
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

// MARK: Formats

// Products and sums stand in statements of their own, and no target below has fused multiply-add: nothing is contracted.

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

INLINE u32x8 select_bits(i32x8 mask, u32x8 yes, u32x8 no) { return ((u32x8)mask & yes) | (~(u32x8)mask & no); }

/// The BF16 nearest to each value, in the upper half of its lane; the lower half is noise. NaN becomes 0x7fff.
INLINE u32x8 round_bf16(f32x8 value) {
  u32x8 bits = (u32x8)value;
  u32x8 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return select_bits((i32x8)(value != value), (u32x8){} + 0x7fff0000, rounded);
}

/// FP16 in the lower half of each lane; the upper half is zero.
INLINE f32x8 widen_fp16(u32x8 bits) {
  u32x8 magnitude = (u32x8)((f32x8)((bits & 0x7fff) << 13) * 0x1p112f);
  i32x8 is_special = (i32x8)((bits & 0x7c00) == 0x7c00);
  magnitude |= (u32x8)is_special & 0x7f800000;
  return (f32x8)(magnitude | ((bits & 0x8000) << 16));
}

/// The FP16 nearest to each value, in the lower half of its lane. NaN becomes 0x7fff.
INLINE u32x8 round_fp16(f32x8 value) {
  u32x8 bits = (u32x8)value;
  u32x8 magnitude = bits & 0x7fffffff;
  u32x8 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  u32x8 subnormal = (u32x8)((f32x8)magnitude + 0.5f) - 0x3f000000;
  u32x8 half = select_bits((i32x8)(magnitude < 0x38800000), subnormal, normal);
  half = select_bits((i32x8)(magnitude >= 0x47800000), (u32x8){} + 0x7c00, half) | ((bits >> 16) & 0x8000);
  return select_bits((i32x8)(magnitude > 0x7f800000), (u32x8){} + 0x7fff, half);
}

/// The E4M3 nearest to each value, in the lowest byte of its lane; the others are zero. No finite value's magnitude is above
/// 448, which scaling sees to. Only with `special` are infinities and NaN taken care of: 0x7e and 0x7f.
INLINE u32x8 round_e4m3(f32x8 value, bool special) {
  u32x8 bits = (u32x8)value;
  u32x8 magnitude = bits & 0x7fffffff;
  u32x8 normal = (magnitude + 0x7ffff + ((magnitude >> 20) & 1) - (120u << 23)) >> 20;
  u32x8 subnormal = (u32x8)((f32x8)magnitude + 0x1p14f) - 0x46800000;
  u32x8 code = select_bits((i32x8)(magnitude < 0x3c800000), subnormal, normal);
  if (special) code = select_bits((i32x8)(magnitude == 0x7f800000), (u32x8){} + 0x7e, code);
  code |= (bits >> 24) & 0x80;
  if (special) code = select_bits((i32x8)(magnitude > 0x7f800000), (u32x8){} + 0x7f, code);
  return code;
}

/// What E4M3 codes of positive numbers stand for; NaN is not taken care of.
INLINE f32x8 widen_e4m3(u32x8 code) {
  f32x8 subnormal = __builtin_convertvector((i32x8)code, f32x8) * 0x1p-9f;
  return (f32x8)select_bits((i32x8)(code < 8), (u32x8)subnormal, (code << 20) + (120u << 23));
}

/// The E2M1 nearest to each positive value, in the lowest bits of its lane; the others are zero. What is greater than 6, or
/// NaN, becomes 6.
INLINE u32x8 round_e2m1(f32x8 value) {
  u32x8 bits = __builtin_elementwise_min((u32x8)value, (u32x8){} + 0x40c00000);
  u32x8 large = ((bits + 0x1fffff + ((bits >> 22) & 1)) >> 22) - 252;
  // The sum rounds to halves.
  u32x8 small = (u32x8)((f32x8)bits + 0x1p22f) - 0x4a800000;
  return select_bits((i32x8)(bits < 0x40000000), small, large);
}

// MARK: LogFMT

// See EPKernels.LogFMT, which says the same for one channel.

enum { LOGFMT_CHANNELS = 128 };

struct logfmt_record {
  uint32_t start, step;
  uint8_t low[LOGFMT_CHANNELS];
  uint8_t high[LOGFMT_CHANNELS / 4];
};
static const uint32_t LOGFMT_APART = UINT32_MAX;

/// The significand, from 1 to 2, becomes the polynomial of it; exponents stay as they are.
INLINE u32x8 logfmt_map(u32x8 bits, const float *coefficients, int count) {
  f32x8 u = (f32x8)((bits & 0x7fffff) | 0x3f800000);
  f32x8 y = (f32x8){} + coefficients[0];
#pragma clang loop unroll(full)
  for (int i = 1; i < count; i++) {
    y = y * u;
    y = y + coefficients[i];
  }
  return (bits & 0x7f800000) + (u32x8)y - 0x3f800000;
}

INLINE u32x8 logfmt_logarithm(u32x8 bits) {
  static const float coefficients[] = {
      0.04514904320240021f, -0.41932088136672974f, 1.6413991451263428f,
      -3.568859100341797f,  5.10697603225708f,     -1.8053442239761353f,
  };
  return logfmt_map(bits, coefficients, 6);
}

INLINE u32x8 logfmt_power(u32x8 logarithm) {
  static const float coefficients[] = {
      0.013701998628675938f, -0.003063733922317624f, 0.16852903366088867f, 0.3103290796279907f, 0.5105036497116089f,
  };
  return logfmt_map(logarithm, coefficients, 5);
}

/// Eight channels, whose BF16 bits are in the lower halves of their lanes, as codes with the sign at bit 9.
INLINE u32x8 logfmt_codes(u32x8 channels, uint32_t start, float inverse) {
  u32x8 magnitudes = channels & 0x7fff;
  f32x8 steps = __builtin_convertvector((i32x8)(logfmt_logarithm(magnitudes << 16) - start), f32x8) * inverse;
  // The sum rounds to whole steps.
  u32x8 codes = ((u32x8)(steps + 0x1p23f) & 0x1ff) + 1;
  return (codes & (u32x8)(magnitudes != 0)) | ((channels & 0x8000) >> 6);
}

/// Channels of codes of nine bits and signs of one.
INLINE f32x8 logfmt_values(u32x8 codes, u32x8 signs, const struct logfmt_record *record) {
  u32x8 magnitudes = logfmt_power(record->start + (codes - 1) * record->step);
  return (f32x8)((magnitudes & (u32x8)(codes != 0)) | signs << 31);
}

INLINE void encode_logfmt_block(struct logfmt_record *record, void *exact, const uint16_t *source) {
  u16x16 largest = {}, least = ~(u16x16){};
  for (int i = 0; i < LOGFMT_CHANNELS; i += 16) {
    u16x16 magnitudes = (u16x16)load_lanes(source + i) & 0x7fff;
    largest = __builtin_elementwise_max(largest, magnitudes);
    // Zero comes last.
    least = __builtin_elementwise_min(least, magnitudes - 1);
  }
  uint32_t top = __builtin_reduce_max(largest), bottom = __builtin_reduce_min(least);
  bool is_zero = bottom == UINT16_MAX;
  u32x8 ends = logfmt_logarithm((u32x8){(bottom + 1) << 16, top << 16});
  uint32_t span = ends[1] - ends[0];
  bool is_apart = top >= 0x7f80 || (!is_zero && (bottom < 0x7f || span > 16u << 23));
  record->start = is_zero ? 0 : ends[0];
  record->step = is_apart ? LOGFMT_APART : is_zero ? 0 : (span + 509) / 510;
  if (is_apart) {
    if (exact != source) memcpy(exact, source, 2 * LOGFMT_CHANNELS);
    return;
  }
  float inverse = record->step == 0 ? 0 : 1 / (float)record->step;
  for (int i = 0; i < LOGFMT_CHANNELS; i += 16) {
    u32x8 lanes = load_lanes(source + i);
    u32x8 even = logfmt_codes(lanes & 0xffff, record->start, inverse);
    u32x8 odd = logfmt_codes(lanes >> 16, record->start, inverse);
    u16x8 low = __builtin_convertvector((even & 0xff) | (odd & 0xff) << 8, u16x8);
    memcpy(record->low + i, &low, sizeof low);
    u32x8 high = (even >> 8 | odd >> 8 << 2) << (u32x8){0, 4, 8, 12, 16, 20, 24, 28};
    uint32_t word = __builtin_reduce_or(high);
    memcpy(record->high + i / 4, &word, sizeof word);
  }
}

INLINE void encode_logfmt_any(void *records, void *exact, const void *source, size_t channel_count) {
  for (size_t i = 0; i < channel_count / LOGFMT_CHANNELS; i++) {
    size_t offset = 2 * LOGFMT_CHANNELS * i;
    encode_logfmt_block(
        (struct logfmt_record *)records + i, (char *)exact + offset, (const uint16_t *)((const char *)source + offset));
  }
}

// MARK: Reduction

/// Sixteen elements. Of a format of 16 bits, `first` holds those at even indices and `second` those at odd ones: taking a 32-bit lane
/// apart is cheaper than widening.
struct sixteen {
  f32x8 first, second;
};

INLINE size_t element_size(int format) { return format == SWIFTEP_FP32 ? 4 : 2; }

INLINE struct sixteen load_sixteen(int format, const void *from) {
  u32x8 lanes = load_lanes(from);
  struct sixteen values;
  switch (format) {
  case SWIFTEP_BF16:
    values.first = (f32x8)(lanes << 16);
    values.second = (f32x8)(lanes & 0xffff0000);
    break;
  case SWIFTEP_FP16:
    values.first = widen_fp16(lanes & 0xffff);
    values.second = widen_fp16(lanes >> 16);
    break;
  default:
    values.first = (f32x8)lanes;
    memcpy(&values.second, (const char *)from + 32, 32);
  }
  return values;
}

/// Of a row of records, channels `first` and up.
INLINE struct sixteen load_logfmt(const void *records, const void *exact, size_t first) {
  const struct logfmt_record *record = (const struct logfmt_record *)records + first / LOGFMT_CHANNELS;
  if (record->step == LOGFMT_APART) return load_sixteen(SWIFTEP_BF16, (const char *)exact + 2 * first);
  size_t channel = first % LOGFMT_CHANNELS;
  u16x8 low;
  uint32_t word;
  memcpy(&low, record->low + channel, sizeof low);
  memcpy(&word, record->high + channel / 4, sizeof word);
  u32x8 lanes = __builtin_convertvector(low, u32x8);
  u32x8 high = ((u32x8){} + word) >> (u32x8){0, 4, 8, 12, 16, 20, 24, 28};
  struct sixteen values;
  values.first = logfmt_values((lanes & 0xff) | (high & 1) << 8, high >> 1 & 1, record);
  values.second = logfmt_values(lanes >> 8 | (high & 4) << 6, high >> 3 & 1, record);
  return values;
}

INLINE void store_sixteen(int format, void *to, struct sixteen values, bool streaming) {
  u32x8 nan = (u32x8){} + 0x7fffffff;
  switch (format) {
  case SWIFTEP_BF16:
    store_lanes(to, (round_bf16(values.first) >> 16) | (round_bf16(values.second) & 0xffff0000), streaming);
    break;
  case SWIFTEP_FP16:
    store_lanes(to, round_fp16(values.first) | (round_fp16(values.second) << 16), streaming);
    break;
  default:
    store_lanes(to, select_bits((i32x8)(values.first != values.first), nan, (u32x8)values.first), streaming);
    store_lanes(
        (char *)to + 32, select_bits((i32x8)(values.second != values.second), nan, (u32x8)values.second), streaming);
  }
}

/// Bytes ahead of the sum at which its rows are fetched: the processor's own prefetching stops at every page.
enum { PREFETCH = 2048 };

/// Elements `first` and up, `16 * units` of them; `units` is a compile-time constant.
INLINE void reduce_block(
    int format, void *output, const struct swiftep_reduction *r, bool is_weighted, size_t first, int units,
    bool streaming) {
  struct sixteen sums[4] = {};
  size_t size = element_size(format);
  if (!streaming) {
    for (size_t byte = 0; byte < 16 * units * size; byte += 64) {
      __builtin_prefetch((char *)output + first * size + 1024 + byte, 1);
    }
  }
  bool is_coded = format == SWIFTEP_CODED_BF16;
  int plain = is_coded ? SWIFTEP_BF16 : format;
  for (int s = 0; s < r->row_count; s++) {
    const char *from = (const char *)r->rows[s] + (is_coded ? 0 : first * size);
    for (size_t byte = 0; !is_coded && byte < 16 * units * size; byte += 64) __builtin_prefetch(from + PREFETCH + byte);
#pragma clang loop unroll(full)
    for (int u = 0; u < units; u++) {
      struct sixteen values =
          is_coded ? load_logfmt(from, r->exact[s], first + 16 * u) : load_sixteen(format, from + 16 * u * size);
      if (is_weighted) {
        values.first *= r->weights[s];
        values.second *= r->weights[s];
      }
      sums[u].first += values.first;
      sums[u].second += values.second;
    }
  }
  const void *biases[2] = {r->bias0, r->bias1};
  for (int b = 0; b < 2; b++) {
    if (!biases[b]) continue;
#pragma clang loop unroll(full)
    for (int u = 0; u < units; u++) {
      struct sixteen values = load_sixteen(plain, (const char *)biases[b] + (first + 16 * u) * size);
      sums[u].first += values.first;
      sums[u].second += values.second;
    }
  }
#pragma clang loop unroll(full)
  for (int u = 0; u < units; u++) store_sixteen(plain, (char *)output + (first + 16 * u) * size, sums[u], streaming);
}

/// The last, fewer than sixteen elements: the same arithmetic on padded copies.
INLINE void reduce_tail(int format, void *output, const struct swiftep_reduction *r, size_t first, size_t count) {
  struct sixteen sum = {};
  size_t size = element_size(format);
  char padded[64] = {};
  for (int s = 0; s < r->row_count + 2; s++) {
    const void *row = s < r->row_count ? r->rows[s] : s == r->row_count ? r->bias0 : r->bias1;
    if (!row) continue;
    memcpy(padded, (const char *)row + first * size, count * size);
    struct sixteen values = load_sixteen(format, padded);
    if (s < r->row_count && r->weights) {
      values.first *= r->weights[s];
      values.second *= r->weights[s];
    }
    sum.first += values.first;
    sum.second += values.second;
  }
  store_sixteen(format, padded, sum, false);
  memcpy((char *)output + first * size, padded, count * size);
}

INLINE void reduce_format(
    int format, void *output, const struct swiftep_reduction *r, size_t first, size_t count, bool streaming) {
  size_t end = first + count;
  streaming = streaming && ((uintptr_t)output + first * element_size(format)) % 16 == 0;
  if (r->weights) {
    for (; first + 64 <= end; first += 64) reduce_block(format, output, r, true, first, 4, streaming);
    for (; first + 16 <= end; first += 16) reduce_block(format, output, r, true, first, 1, streaming);
  } else {
    for (; first + 64 <= end; first += 64) reduce_block(format, output, r, false, first, 4, streaming);
    for (; first + 16 <= end; first += 16) reduce_block(format, output, r, false, first, 1, streaming);
  }
  // Of LogFMT rows, elements come in sixteens.
  if (format != SWIFTEP_CODED_BF16 && first < end) reduce_tail(format, output, r, first, end - first);
}

INLINE void reduce_any(void *output, const struct swiftep_reduction *r, size_t first, size_t count, bool streaming) {
  switch (r->format) {
  case SWIFTEP_BF16: reduce_format(SWIFTEP_BF16, output, r, first, count, streaming); break;
  case SWIFTEP_FP16: reduce_format(SWIFTEP_FP16, output, r, first, count, streaming); break;
  case SWIFTEP_CODED_BF16: reduce_format(SWIFTEP_CODED_BF16, output, r, first, count, streaming); break;
  default: reduce_format(SWIFTEP_FP32, output, r, first, count, streaming); break;
  }
}

// MARK: Quantization

/// The largest magnitude of `channel_count` BF16 channels, a multiple of 16, as BF16 bits: NaN above infinity above all else.
INLINE uint16_t largest_magnitude(const uint16_t *source, size_t channel_count) {
  u16x16 largest = {};
  for (size_t i = 0; i < channel_count; i += 16) {
    largest = __builtin_elementwise_max(largest, (u16x16)load_lanes(source + i) & 0x7fff);
  }
  return __builtin_reduce_max(largest);
}

INLINE void quantize_block(uint8_t *values, const uint16_t *source, size_t channel_count, float inverse, bool special) {
  for (size_t i = 0; i < channel_count; i += 16) {
    u32x8 lanes = load_lanes(source + i);
    f32x8 even = (f32x8)(lanes << 16);
    f32x8 odd = (f32x8)(lanes & 0xffff0000);
    u32x8 pairs = round_e4m3(even * inverse, special) | (round_e4m3(odd * inverse, special) << 8);
    u16x8 codes = __builtin_convertvector(pairs, u16x8);
    memcpy(values + i, &codes, sizeof codes);
  }
}

INLINE void quantize_any(
    uint8_t *values, void *scales, const uint16_t *source, size_t channel_count, bool power_of_two) {
  for (size_t first = 0, block = 0; first < channel_count; first += 128, block++) {
    size_t count = channel_count - first < 128 ? channel_count - first : 128;
    uint16_t top = largest_magnitude(source + first, count);
    bool special = top >= 0x7f80;
    uint32_t amax_bits = (uint32_t)top << 16;
    float amax;
    memcpy(&amax, &amax_bits, sizeof amax);
    if (amax < 1e-4f) amax = 1e-4f;
    float scale = amax / 448.0f;
    float inverse = 448.0f / amax;
    if (power_of_two) {
      uint32_t bits;
      memcpy(&bits, &scale, sizeof bits);
      uint32_t exponent = special ? 255 : (bits >> 23) + ((bits & 0x7fffff) != 0);
      uint32_t inverse_bits = special ? 0x7fc00000 : (254 - exponent) << 23;
      memcpy(&inverse, &inverse_bits, sizeof inverse);
      ((uint8_t *)scales)[block] = (uint8_t)exponent;
    } else {
      ((float *)scales)[block] = scale;
    }
    if (special) {
      quantize_block(values + first, source + first, count, inverse, true);
    } else {
      quantize_block(values + first, source + first, count, inverse, false);
    }
  }
}

/// Eight blocks of 16 channels, or four, have their scales and factors made together.
INLINE void quantize_nvfp4_any(
    uint8_t *values, uint8_t *scales, const uint16_t *source, size_t channel_count, float global_scale) {
  for (size_t first = 0; first < channel_count; first += 128) {
    size_t block_count = (channel_count - first < 128 ? channel_count - first : 128) / 16;
    uint32_t tops[8] = {0};
    for (size_t b = 0; b < block_count; b++) {
      tops[b] = (uint32_t)largest_magnitude(source + first + 16 * b, 16) << 16;
    }
    u32x8 amax = load_lanes(tops);
    f32x8 wanted = (f32x8)amax / 6.0f;
    wanted *= global_scale;
    f32x8 bounded = (f32x8)__builtin_elementwise_min((u32x8)wanted, (u32x8){} + 0x43e00000);
    u32x8 codes = round_e4m3(bounded, false);
    u32x8 factors = (u32x8)(global_scale / widen_e4m3(codes)) & (u32x8)(codes != 0);
    i32x8 is_special = (i32x8)(amax >= 0x7f800000);
    codes = select_bits(is_special, (u32x8){} + 0x7f, codes);
    factors = select_bits(is_special, (u32x8){} + 0x7fc00000, factors);
    u8x8 bytes = __builtin_convertvector(codes, u8x8);
    memcpy(scales + first / 16, &bytes, block_count);
    for (size_t b = 0; b < block_count; b++) {
      f32x8 factor = (f32x8)((u32x8){} + factors[b]);
      u32x8 lanes = load_lanes(source + first + 16 * b);
      f32x8 even = (f32x8)((lanes & 0x7fff) << 16);
      f32x8 odd = (f32x8)(lanes & 0x7fff0000);
      u32x8 pairs = round_e2m1(even * factor) | (round_e2m1(odd * factor) << 4);
      pairs |= ((lanes >> 12) & 8) | ((lanes >> 24) & 0x80);
      bytes = __builtin_convertvector(pairs, u8x8);
      memcpy(values + (first + 16 * b) / 2, &bytes, sizeof bytes);
    }
  }
}

// MARK: One function, two instruction sets

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
AVX2 static void scatter_avx2(
    void *const *destinations, int destination_count, const void *source, size_t byte_count, bool streaming) {
  scatter_any(destinations, destination_count, source, byte_count, streaming);
}
AVX2 static void reduce_avx2(void *output, const struct swiftep_reduction *r, size_t first, size_t count, bool streaming) {
  reduce_any(output, r, first, count, streaming);
}
AVX2 static void quantize_avx2(uint8_t *values, void *scales, const uint16_t *source, size_t channel_count, bool power_of_two) {
  quantize_any(values, scales, source, channel_count, power_of_two);
}
AVX2 static void quantize_nvfp4_avx2(
    uint8_t *values, uint8_t *scales, const uint16_t *source, size_t channel_count, float global_scale) {
  quantize_nvfp4_any(values, scales, source, channel_count, global_scale);
}
AVX2 static void encode_logfmt_avx2(void *records, void *exact, const void *source, size_t channel_count) {
  encode_logfmt_any(records, exact, source, channel_count);
}
#define HAS_AVX2 __builtin_cpu_supports("avx2")
#else
#define HAS_AVX2 0
#define scatter_avx2 scatter_any
#define reduce_avx2 reduce_any
#define quantize_avx2 quantize_any
#define quantize_nvfp4_avx2 quantize_nvfp4_any
#define encode_logfmt_avx2 encode_logfmt_any
#endif

void swiftep_scatter(
    void *const *destinations, int destination_count, const void *source, size_t byte_count, bool streaming) {
  if (HAS_AVX2) {
    scatter_avx2(destinations, destination_count, source, byte_count, streaming);
  } else {
    scatter_any(destinations, destination_count, source, byte_count, streaming);
  }
}

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

void swiftep_quantize_nvfp4(
    uint8_t *values, uint8_t *scales, const uint16_t *source, size_t channel_count, float global_scale) {
  if (HAS_AVX2) {
    quantize_nvfp4_avx2(values, scales, source, channel_count, global_scale);
  } else {
    quantize_nvfp4_any(values, scales, source, channel_count, global_scale);
  }
}

void swiftep_encode_logfmt(void *records, void *exact, const void *source, size_t channel_count) {
  if (HAS_AVX2) {
    encode_logfmt_avx2(records, exact, source, channel_count);
  } else {
    encode_logfmt_any(records, exact, source, channel_count);
  }
}
