// What the two implementations of pack_kv, unpack_kv and kv_lerp_ share: rows as pointers and strides, and e4m3 codes.
//
// Letters as in kvlock_kernels/reference.py: B samples, H heads, D head dimension, rows = len(index).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KVLOCK_INLINE __host__ __device__ __forceinline__
#else
#define KVLOCK_INLINE inline __attribute__((always_inline))
#endif

namespace kvlock {

enum class Dtype { fp32, bf16, fp16, int8, e4m3 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::fp32 ? 4 : dtype == Dtype::bf16 || dtype == Dtype::fp16 ? 2 : 1;
}

constexpr float INT8_LIMIT = 127.0f;  // -128 stays unused, so that the code is symmetric
constexpr float E4M3_LIMIT = 448.0f;  // largest finite e4m3
constexpr float FP32_TINY = 0x1p-126f;  // smallest normal fp32; the reciprocal of a smaller scale may overflow
constexpr float ROUNDS_TO_WHOLE = 12582912.0f;  // 1.5 * 2^23: added to |x| <= 2^22, the sum ends in x to nearest even

struct Shape {
  int64_t samples, rows, heads, dim;
};

// Rows [B, rows, H, D] in memory of any strides, counted in elements. Row i is token index[i], or i without an index.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t batch, token, head, element;  // batch is 0 where all samples share the rows
  const int32_t* index;
};

// codes[b, i, h] = round((x[b, i, h] - mean[b, h]) * (1 / scale[b, i, h])),   scale = max_d |x - mean| / limit
struct Encode {
  Shape shape;
  Rows x;
  const float* mean;  // [1 or B, H, D], or null
  int64_t mean_batch;
  Dtype dtype;  // int8 or e4m3
  void* codes;  // [B, rows, H, D]
  float* scale;  // [B, rows, H]
};

// to[b, i] = (1 - a) * to[b, i] + a * s,   s = from[b, i] * scale[b, i] + mean[b];   a <= 0 leaves `to`, a >= 1 gives s
struct Mix {
  Shape shape;
  Rows to, from;
  const float* scale;  // [1 or B, rows, H]; null where `from` is not 8-bit, and only there
  int64_t scale_batch;
  const float* mean;  // [1 or B, H, D], or null
  int64_t mean_batch;
  const float* ratio;  // [B], or null for a = 1
};

namespace cpu {
void encode(const Encode& call);
void mix(const Mix& call);
}  // namespace cpu

namespace cuda {
bool has_code_for_current_device();
const char* encode(const Encode& call, void* stream);  // an error message, or null
const char* mix(const Mix& call, void* stream);
}  // namespace cuda

KVLOCK_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

KVLOCK_INLINE float fp32_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Encodes |x| < 464 or NaN to nearest even.
KVLOCK_INLINE uint32_t fp32_to_e4m3(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFF;
  // Keep 3 of 23 mantissa bits; the exponent's bias goes from 127 to 7.
  const uint32_t normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the codes are 2^-9 apart, as fp32 numbers are at 2^14. Rounding up to 8 gives the smallest normal code.
  const uint32_t subnormal = bits_of(fp32_of(size) + 16384.0f) - bits_of(16384.0f);
  uint32_t code = size < (121u << 23) ? subnormal : normal;
  code = size > 0x7F800000 ? 0x7F : code;
  return code | ((bits >> 24) & 0x80);
}

KVLOCK_INLINE float e4m3_to_fp32(uint32_t code) {
  const uint32_t size = code & 0x7F;
  const float subnormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f;
  uint32_t bits = size < 8 ? bits_of(subnormal) : (size << 20) + (120u << 23);
  bits = size == 0x7F ? 0x7FC00000 : bits;
  return fp32_of(bits | ((code & 0x80) << 24));
}

}  // namespace kvlock
