// 8 elements of a row, as a thread loads, widens, narrows and stores them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "pack_kv.h"

namespace kvlock::cuda {
namespace {

struct int8 {  // codes of one byte
  uint8_t code;
};
struct e4m3 {
  uint8_t code;
};

// 8 elements, in words that one or two instructions move.
template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Eight {
  uint32_t word[2 * sizeof(T)];
};

__device__ void widen(const Eight<float>& x, float (&y)[8]) {
  for (int k = 0; k < 8; k++) y[k] = __uint_as_float(x.word[k]);
}

__device__ void widen(const Eight<__nv_bfloat16>& x, float (&y)[8]) {
  for (int k = 0; k < 4; k++) {
    y[2 * k] = __uint_as_float(x.word[k] << 16);
    y[2 * k + 1] = __uint_as_float(x.word[k] & 0xFFFF0000);
  }
}

__device__ float2 halves(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof pair);
  return __half22float2(pair);
}

__device__ void widen(const Eight<__half>& x, float (&y)[8]) {
  for (int k = 0; k < 4; k++) {
    const float2 pair = halves(x.word[k]);
    y[2 * k] = pair.x, y[2 * k + 1] = pair.y;
  }
}

// A whole number below 2^23 is the mantissa of 2^23 plus itself; 128 makes the code one.
__device__ void widen(const Eight<int8>& x, float (&y)[8]) {
  for (int k = 0; k < 8; k++) {
    const uint32_t unsigned_codes = x.word[k / 4] ^ 0x80808080;
    y[k] = __uint_as_float(__byte_perm(unsigned_codes, 0x4B000000, 0x7540 + k % 4)) - (8388608.0f + 128.0f);
  }
}

__device__ void widen(const Eight<e4m3>& x, float (&y)[8]) {
  for (int k = 0; k < 4; k++) {
    const uint32_t codes = x.word[k / 2] >> (k % 2 * 16) & 0xFFFF;
#if __CUDA_ARCH__ >= 890
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    const float2 pair = __half22float2(__half2(raw));
    y[2 * k] = pair.x, y[2 * k + 1] = pair.y;
#else
    y[2 * k] = e4m3_to_fp32(codes & 0xFF), y[2 * k + 1] = e4m3_to_fp32(codes >> 8);
#endif
  }
}

__device__ void narrow(const float (&x)[8], Eight<float>& y) {
  for (int k = 0; k < 8; k++) y.word[k] = __float_as_uint(x[k]);
}

__device__ void narrow(const float (&x)[8], Eight<__nv_bfloat16>& y) {
  for (int k = 0; k < 4; k++) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * k], x[2 * k + 1]);
    memcpy(&y.word[k], &pair, sizeof pair);
  }
}

__device__ void narrow(const float (&x)[8], Eight<__half>& y) {
  for (int k = 0; k < 4; k++) {
    const __half2 pair = __floats2half2_rn(x[2 * k], x[2 * k + 1]);
    memcpy(&y.word[k], &pair, sizeof pair);
  }
}

__device__ void narrow(const float (&x)[8], Eight<int8>& y) {
  uint32_t whole[8];
  for (int k = 0; k < 8; k++) whole[k] = __float_as_uint(x[k] + ROUNDS_TO_WHOLE);
  for (int k = 0; k < 2; k++) {
    const uint32_t low = __byte_perm(whole[4 * k], whole[4 * k + 1], 0x0040);
    const uint32_t high = __byte_perm(whole[4 * k + 2], whole[4 * k + 3], 0x0040);
    y.word[k] = __byte_perm(low, high, 0x5410);
  }
}

__device__ void narrow(const float (&x)[8], Eight<e4m3>& y) {
  for (int k = 0; k < 2; k++) {
    y.word[k] = 0;
    for (int j = 0; j < 4; j += 2) {
      const float first = x[4 * k + j], second = x[4 * k + j + 1];
#if __CUDA_ARCH__ >= 890
      const uint32_t pair = __nv_cvt_float2_to_fp8x2({first, second}, __NV_SATFINITE, __NV_E4M3);
#else
      const uint32_t pair = fp32_to_e4m3(first) | fp32_to_e4m3(second) << 8;
#endif
      y.word[k] |= pair << 8 * j;
    }
  }
}

// Elements d to d + 7 of a row; WIDE where they lie side by side, aligned and within the row.
template <bool WIDE, class T>
__device__ Eight<T> load(const T* row, int64_t element, int64_t d, int64_t dim) {
  Eight<T> x;
  if constexpr (WIDE) {
    x = *reinterpret_cast<const Eight<T>*>(row + d);
  } else {
    T each[8] = {};
    for (int k = 0; k < 8; k++) {
      if (d + k < dim) each[k] = row[(d + k) * element];
    }
    memcpy(&x, each, sizeof x);
  }
  return x;
}

template <bool WIDE, class T>
__device__ void store(const Eight<T>& x, T* row, int64_t element, int64_t d, int64_t dim) {
  if constexpr (WIDE) {
    *reinterpret_cast<Eight<T>*>(row + d) = x;
  } else {
    T each[8];
    memcpy(each, &x, sizeof x);
    for (int k = 0; k < 8; k++) {
      if (d + k < dim) row[(d + k) * element] = each[k];
    }
  }
}

// 16 codes side by side, which one instruction moves.
template <class Code>
struct alignas(16) Sixteen {
  Eight<Code> half[2];
};

// The 16 codes that element d is among, of a row in which each 16 are aligned.
template <class Code>
__device__ void load_sixteen(const Code* row, int64_t d, Eight<Code>& x, Eight<Code>& y) {
  const Sixteen<Code> codes = *reinterpret_cast<const Sixteen<Code>*>(row + d / 16 * 16);
  x = codes.half[0], y = codes.half[1];
}

template <class Code>
__device__ void store_sixteen(const Eight<Code>& x, const Eight<Code>& y, Code* row, int64_t d) {
  *reinterpret_cast<Sixteen<Code>*>(row + d / 16 * 16) = {x, y};
}

__device__ bool in_odd_lane() { return threadIdx.x & 1; }

// Two lanes side by side hold 16 codes of each of two rows: either each lane its half of both, x of the first row and y
// of the second, or the even lane all of the first row, the odd lane all of the second. Turns either into the other.
template <class Code>
__device__ void exchange(Eight<Code>& x, Eight<Code>& y) {
  const bool odd = in_odd_lane();
  for (int k = 0; k < 2; k++) {
    const uint32_t received = __shfl_xor_sync(~0u, odd ? x.word[k] : y.word[k], 1);
    x.word[k] = odd ? received : x.word[k];
    y.word[k] = odd ? y.word[k] : received;
  }
}

template <bool WIDE>
__device__ void load_mean(const float* mean, int64_t at, int64_t d, int64_t dim, float (&y)[8]) {
  widen(load<WIDE>(mean + at, 1, d, dim), y);
}

}  // namespace
}  // namespace kvlock::cuda
