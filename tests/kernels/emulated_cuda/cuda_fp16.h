#pragma once

struct float2 {
  float x, y;
};
using __half = _Float16;
struct __half2 {
  __half x, y;
};

inline float2 __half22float2(__half2 z) { return {static_cast<float>(z.x), static_cast<float>(z.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {static_cast<__half>(x), static_cast<__half>(y)}; }
