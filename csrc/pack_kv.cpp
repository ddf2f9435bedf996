// The CPU's implementation: threads take tokens, and every loop over the H * D elements of a token is one that the
// compiler vectorises. Built with -ffp-contract=off, because the bits are those of the reference.
#include "pack_kv.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// Loops are compiled for several instruction sets, of which the loader takes the best one that the CPU has.
// Older compilers than GCC 12 do not know these names.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VECTORISED
#endif

namespace kvlock::cpu {
namespace {

using Bytes = std::vector<char>;
using Floats = std::vector<float>;

constexpr int64_t ELEMENTS_A_THREAD = 1 << 15;  // less work than this is not worth a thread

VECTORISED void widen_bf16(const uint16_t* __restrict x, int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; i++) y[i] = fp32_of(static_cast<uint32_t>(x[i]) << 16);
}

VECTORISED void widen_fp16(const uint16_t* __restrict x, int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t code = x[i], size = code & 0x7FFF;
    const float subnormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
    uint32_t bits = size < 0x400 ? bits_of(subnormal) : (size << 13) + (112u << 23);
    bits = size >= 0x7C00 ? (size << 13) | 0x7F800000 : bits;
    y[i] = fp32_of(bits | ((code & 0x8000) << 16));
  }
}

VECTORISED void widen_int8(const int8_t* __restrict x, int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<float>(static_cast<int32_t>(x[i]));
}

VECTORISED void widen_e4m3(const uint8_t* __restrict x, int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; i++) y[i] = e4m3_to_fp32(x[i]);
}

VECTORISED void narrow_to_bf16(const float* __restrict x, int64_t n, uint16_t* __restrict y) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = bits_of(x[i]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    y[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

VECTORISED void narrow_to_fp16(const float* __restrict x, int64_t n, uint16_t* __restrict y) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = bits_of(x[i]), size = bits & 0x7FFFFFFF;
    const uint32_t normal = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10);
    const uint32_t subnormal = bits_of(fp32_of(size) + 0.5f) - bits_of(0.5f);  // 2^-24 apart, as fp32 is at 1/2
    uint32_t code = size < (113u << 23) ? subnormal : normal;
    code = size >= (143u << 23) ? 0x7C00 : code;
    code = size > 0x7F800000 ? 0x7E00 : code;
    y[i] = static_cast<uint16_t>(code | ((bits >> 16) & 0x8000));
  }
}

VECTORISED void subtract(float* __restrict x, const float* __restrict mean, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = x[i] - mean[i];
}

VECTORISED void add(float* __restrict x, const float* __restrict mean, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = x[i] + mean[i];
}

VECTORISED void multiply(float* __restrict x, float scale, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = x[i] * scale;
}

VECTORISED void lerp(const float* __restrict x, const float* __restrict source, float a, int64_t n,
                     float* __restrict y) {
  const float rest = 1.0f - a;
  for (int64_t i = 0; i < n; i++) y[i] = rest * x[i] + a * source[i];
}

// As whole numbers the bits of |x| have the order of |x|, with NaN above all.
VECTORISED float largest(const float* __restrict x, int64_t n) {
  int32_t bits = 0;
  for (int64_t i = 0; i < n; i++) bits = std::max(bits, static_cast<int32_t>(bits_of(x[i]) & 0x7FFFFFFF));
  return fp32_of(static_cast<uint32_t>(bits));
}

VECTORISED void encode_int8(const float* __restrict x, float inverse, int64_t n, int8_t* __restrict y) {
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<int8_t>(bits_of(x[i] * inverse + ROUNDS_TO_WHOLE));
}

VECTORISED void encode_e4m3(const float* __restrict x, float inverse, int64_t n, uint8_t* __restrict y) {
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<uint8_t>(fp32_to_e4m3(x[i] * inverse));
}

// The same without NaN, in fewer instructions. Codes from 2^e on are 2^(e - 3) apart, as fp32 numbers are from 2^(e + 20)
// on: a sum of both rounds to nearest even, and counts the codes above 2^e. Those below 2^-6 are as far apart as above.
// Whole words first, because the compiler narrows a loop of mixed sizes piece by piece.
VECTORISED void encode_finite_e4m3(const float* __restrict x, float inverse, int64_t n, uint32_t* __restrict words,
                                   uint8_t* __restrict y) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = bits_of(x[i] * inverse);
    const float power = std::max(fp32_of(bits & 0x7F800000), 0x1p-6f);
    const float coarse = power * 0x1p20f;
    const uint32_t count = bits_of(fp32_of(bits & 0x7FFFFFFF) + coarse) - bits_of(coarse);
    words[i] = (count + (bits_of(power) >> 20) - (121u << 3)) | ((bits >> 24) & 0x80);
  }
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<uint8_t>(words[i]);
}

void widen(Dtype dtype, const void* x, int64_t n, float* y) {
  switch (dtype) {
    case Dtype::fp32: std::memcpy(y, x, n * sizeof(float)); return;
    case Dtype::bf16: widen_bf16(static_cast<const uint16_t*>(x), n, y); return;
    case Dtype::fp16: widen_fp16(static_cast<const uint16_t*>(x), n, y); return;
    case Dtype::int8: widen_int8(static_cast<const int8_t*>(x), n, y); return;
    case Dtype::e4m3: widen_e4m3(static_cast<const uint8_t*>(x), n, y); return;
  }
}

void narrow(Dtype dtype, const float* x, int64_t n, void* y) {
  switch (dtype) {
    case Dtype::bf16: narrow_to_bf16(x, n, static_cast<uint16_t*>(y)); return;
    case Dtype::fp16: narrow_to_fp16(x, n, static_cast<uint16_t*>(y)); return;
    default: std::memcpy(y, x, n * sizeof(float)); return;
  }
}

// One token of one sample, [H, D].
class Token {
 public:
  Token(const Rows& rows, const Shape& shape, int64_t b, int64_t i)
      : size_(size_of(rows.dtype)), heads_(shape.heads), dim_(shape.dim), head_(rows.head), element_(rows.element) {
    const int64_t token = rows.index ? rows.index[i] : i;
    data_ = static_cast<char*>(rows.data) + (b * rows.batch + token * rows.token) * size_;
  }

  // Where its elements lie side by side: in place, or else in `buffer`.
  char* side_by_side(Bytes& buffer) const {
    if (element_ == 1 && (head_ == dim_ || heads_ == 1)) return data_;
    buffer.resize(heads_ * dim_ * size_);
    return buffer.data();
  }

  const char* read(Bytes& buffer) const {
    char* to = side_by_side(buffer);
    if (to != data_) move<false>(to);
    return to;
  }

  // What stands at side_by_side(buffer) becomes the token.
  void written(const char* from) const {
    if (from != data_) move<true>(const_cast<char*>(from));
  }

 private:
  template <bool SCATTER>
  void move(char* dense) const {
    for (int64_t h = 0; h < heads_; h++) {
      const int64_t run = element_ == 1 ? dim_ : 1;  // elements that lie side by side
      for (int64_t d = 0; d < dim_; d += run, dense += run * size_) {
        char* strided = data_ + (h * head_ + d * element_) * size_;
        std::memcpy(SCATTER ? strided : dense, SCATTER ? dense : strided, run * size_);
      }
    }
  }

  char* data_;
  int64_t size_, heads_, dim_, head_, element_;
};

template <class Function>
void each_token(const Shape& shape, const Function& function) {
  const int64_t width = std::max<int64_t>(shape.heads * shape.dim, 1);
  const int64_t tokens = std::max<int64_t>(ELEMENTS_A_THREAD / width, 1);
  torch::stable::parallel_for(0, shape.samples * shape.rows, tokens, function);
}

}  // namespace

void encode(const Encode& call) {
  const auto [samples, rows, heads, dim] = call.shape;
  const int64_t width = heads * dim;
  const float limit = call.dtype == Dtype::int8 ? INT8_LIMIT : E4M3_LIMIT;
  each_token(call.shape, [&](int64_t begin, int64_t end) {
    Bytes buffer;
    Floats values(width);
    std::vector<uint32_t> words(dim);
    for (int64_t at = begin; at < end; at++) {
      const int64_t b = at / rows;
      widen(call.x.dtype, Token(call.x, call.shape, b, at % rows).read(buffer), width, values.data());
      if (call.mean) subtract(values.data(), call.mean + b * call.mean_batch, width);
      for (int64_t h = 0; h < heads; h++) {
        const float* row = values.data() + h * dim;
        char* codes = static_cast<char*>(call.codes) + (at * heads + h) * dim;
        float scale = largest(row, dim) / limit;
        scale = scale < FP32_TINY ? 1.0f : scale;
        call.scale[at * heads + h] = scale;
        if (call.dtype == Dtype::e4m3) {
          auto* to = reinterpret_cast<uint8_t*>(codes);
          if (std::isfinite(scale)) {
            encode_finite_e4m3(row, 1.0f / scale, dim, words.data(), to);
          } else {
            encode_e4m3(row, 1.0f / scale, dim, to);
          }
        } else if (std::isfinite(scale)) {
          encode_int8(row, 1.0f / scale, dim, reinterpret_cast<int8_t*>(codes));
        } else {
          std::memset(codes, 0, dim);  // what a cast of NaN to int8 gives
        }
      }
    }
  });
}

void mix(const Mix& call) {
  const auto [samples, rows, heads, dim] = call.shape;
  const int64_t width = heads * dim;
  each_token(call.shape, [&](int64_t begin, int64_t end) {
    Bytes from_buffer, to_buffer;
    Floats source(width), old(width), mixed(width);
    for (int64_t at = begin; at < end; at++) {
      const int64_t b = at / rows, i = at % rows;
      const float a = call.ratio ? call.ratio[b] : 1.0f;
      if (a <= 0) continue;
      const Token to(call.to, call.shape, b, i);
      const char* from = Token(call.from, call.shape, b, i).read(from_buffer);
      char* result = to.side_by_side(to_buffer);
      if (a >= 1 && call.from.dtype == call.to.dtype) {
        std::memcpy(result, from, width * size_of(call.to.dtype));
        to.written(result);
        continue;
      }
      widen(call.from.dtype, from, width, source.data());
      if (call.scale) {
        const float* scale = call.scale + b * call.scale_batch + i * heads;
        for (int64_t h = 0; h < heads; h++) multiply(source.data() + h * dim, scale[h], dim);
      }
      if (call.mean) add(source.data(), call.mean + b * call.mean_batch, width);
      if (!(a >= 1)) {
        widen(call.to.dtype, to.read(to_buffer), width, old.data());
        lerp(old.data(), source.data(), a, width, mixed.data());
      }
      narrow(call.to.dtype, a >= 1 ? source.data() : mixed.data(), width, result);
      to.written(result);
    }
  });
}

}  // namespace kvlock::cpu
