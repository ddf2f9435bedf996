#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  const auto rounded = [](float z) {
    const uint32_t bits = __float_as_uint(z), nearest_even = bits + 0x7FFF + (bits >> 16 & 1);
    return __nv_bfloat16{static_cast<uint16_t>(std::isnan(z) ? 0x7FFF : nearest_even >> 16)};
  };
  return {rounded(x), rounded(y)};
}
