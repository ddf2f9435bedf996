// The CPU's implementation: threads take tokens, and every loop over the elements of a token is one that the compiler
// vectorises. Built with -ffp-contract=off, because the bits are those of the reference.
#include "pack_kv.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// Loops are compiled for several instruction sets, of which the loader takes the best one that the CPU has.
// Other compilers, and GCC before 12, do not know these names.
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
// So many codes at a time are whole words between bytes and fp32 where their arithmetic is long: in a loop of mixed sizes
// the compiler does a part of it in bytes, and widens what comes of that piece by piece.
constexpr int64_t BLOCK = 128;

// A dtype: the number of a code, and for a floating one the nearest code of a number.
struct Fp32 {
  using Code = float;
  KVLOCK_INLINE static float number(Code code) { return code; }
  KVLOCK_INLINE static Code nearest(float x) { return x; }
};

struct Bf16 {
  using Code = uint16_t;
  KVLOCK_INLINE static float number(Code code) { return fp32_of(static_cast<uint32_t>(code) << 16); }
  KVLOCK_INLINE static Code nearest(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<Code>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
};

struct Fp16 {
  using Code = uint16_t;
  KVLOCK_INLINE static float number(Code half) {
    const uint32_t code = half, size = code & 0x7FFF;
    const float subnormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
    uint32_t bits = size < 0x400 ? bits_of(subnormal) : (size << 13) + (112u << 23);
    bits = size >= 0x7C00 ? (size << 13) | 0x7F800000 : bits;
    return fp32_of(bits | ((code & 0x8000) << 16));
  }
  KVLOCK_INLINE static Code nearest(float x) {
    const uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFF;
    const uint32_t normal = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10);
    const uint32_t subnormal = bits_of(fp32_of(size) + 0.5f) - bits_of(0.5f);  // 2^-24 apart, as fp32 is at 1/2
    uint32_t code = size < (113u << 23) ? subnormal : normal;
    code = size >= (143u << 23) ? 0x7C00 : code;
    code = size > 0x7F800000 ? 0x7E00 : code;
    return static_cast<Code>(code | ((bits >> 16) & 0x8000));
  }
};

struct Int8 {
  using Code = int8_t;
  using Word = int32_t;
  KVLOCK_INLINE static float number(Word code) { return static_cast<float>(code); }
};

struct E4m3 {
  using Code = uint8_t;
  using Word = uint32_t;
  KVLOCK_INLINE static float number(Word code) { return e4m3_to_fp32(code); }
};

// A row less its mean, and the largest |y| of it. As whole numbers the bits of |y| have the order of |y|, with NaN above
// all.
template <class From, bool MEAN>
VECTORISED float less_mean(const void* row, const float* __restrict mean, int64_t n, float* __restrict y) {
  const auto* __restrict x = static_cast<const typename From::Code*>(row);
  int32_t bits = 0;
  for (int64_t i = 0; i < n; i++) {
    y[i] = MEAN ? From::number(x[i]) - mean[i] : From::number(x[i]);
    bits = std::max(bits, static_cast<int32_t>(bits_of(y[i]) & 0x7FFFFFFF));
  }
  return fp32_of(static_cast<uint32_t>(bits));
}

// Codes times their scale, and plus their mean.
template <class From, bool MEAN>
VECTORISED void times_scale(const void* row, float scale, const float* __restrict mean, int64_t n,
                            float* __restrict y) {
  const auto* __restrict x = static_cast<const typename From::Code*>(row);
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = std::min(begin + BLOCK, n);
    typename From::Word words[BLOCK];
    for (int64_t i = begin; i < end; i++) words[i - begin] = x[i];
    for (int64_t i = begin; i < end; i++) {
      y[i] = From::number(words[i - begin]) * scale;
      if (MEAN) y[i] = y[i] + mean[i];
    }
  }
}

template <class From>
VECTORISED void numbers(const void* row, int64_t n, float* __restrict y) {
  const auto* __restrict x = static_cast<const typename From::Code*>(row);
  for (int64_t i = 0; i < n; i++) y[i] = From::number(x[i]);
}

template <class To>
VECTORISED void narrow(const float* __restrict x, int64_t n, void* row) {
  auto* __restrict y = static_cast<typename To::Code*>(row);
  for (int64_t i = 0; i < n; i++) y[i] = To::nearest(x[i]);
}

template <class To>
VECTORISED void lerp(const float* __restrict source, float a, int64_t n, void* row) {
  auto* __restrict y = static_cast<typename To::Code*>(row);
  const float rest = 1.0f - a;
  for (int64_t i = 0; i < n; i++) y[i] = To::nearest(rest * To::number(y[i]) + a * source[i]);
}

VECTORISED void encode_int8(const float* __restrict x, float inverse, int64_t n, int8_t* __restrict y) {
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<int8_t>(bits_of(x[i] * inverse + ROUNDS_TO_WHOLE));
}

VECTORISED void encode_e4m3(const float* __restrict x, float inverse, int64_t n, uint8_t* __restrict y) {
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<uint8_t>(fp32_to_e4m3(x[i] * inverse));
}

// The same without NaN, in fewer instructions. Codes from 2^e on are 2^(e - 3) apart, as fp32 numbers are from 2^(e + 20)
// on: a sum of both rounds to nearest even, and counts the codes above 2^e. Those below 2^-6 are as far apart as above.
VECTORISED void encode_finite_e4m3(const float* __restrict x, float inverse, int64_t n, uint8_t* __restrict y) {
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = std::min(begin + BLOCK, n);
    uint32_t words[BLOCK];
    for (int64_t i = begin; i < end; i++) {
      const uint32_t bits = bits_of(x[i] * inverse);
      const auto power = static_cast<uint32_t>(std::max<int32_t>(bits & 0x7F800000, 121 << 23));
      const uint32_t coarse = power + (20u << 23);
      const uint32_t count = bits_of(fp32_of(bits & 0x7FFFFFFF) + fp32_of(coarse)) - coarse;
      words[i - begin] = (count + (power >> 20) - (121u << 3)) | ((bits >> 24) & 0x80);
    }
    for (int64_t i = begin; i < end; i++) y[i] = static_cast<uint8_t>(words[i - begin]);
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

// Calls `function` with the struct of a floating dtype.
template <class Function>
auto with_floating(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::bf16: return function(Bf16{});
    case Dtype::fp16: return function(Fp16{});
    default: return function(Fp32{});
  }
}

// A token of source rows as numbers, [H, D].
void decode(const Mix& call, int64_t b, int64_t i, const char* token, float* y) {
  const int64_t heads = call.shape.heads, dim = call.shape.dim;
  if (!call.scale) {
    with_floating(call.from.dtype, [&](auto from) { numbers<decltype(from)>(token, heads * dim, y); });
    return;
  }
  const float* scale = call.scale + b * call.scale_batch + i * heads;
  const float* mean = call.mean ? call.mean + b * call.mean_batch : nullptr;
  const bool int8 = call.from.dtype == Dtype::int8;
  const auto times = int8 ? (mean ? times_scale<Int8, true> : times_scale<Int8, false>)
                          : (mean ? times_scale<E4m3, true> : times_scale<E4m3, false>);
  for (int64_t h = 0; h < heads; h++) {
    times(token + h * dim, scale[h], mean ? mean + h * dim : nullptr, dim, y + h * dim);
  }
}

}  // namespace

void encode(const Encode& call) {
  const auto [samples, rows, heads, dim] = call.shape;
  const float limit = call.dtype == Dtype::int8 ? INT8_LIMIT : E4M3_LIMIT;
  const auto centred = with_floating(call.x.dtype, [&](auto from) {
    return call.mean ? less_mean<decltype(from), true> : less_mean<decltype(from), false>;
  });
  const int64_t size = size_of(call.x.dtype);
  each_token(call.shape, [&](int64_t begin, int64_t end) {
    Bytes buffer;
    Floats values(dim);
    for (int64_t at = begin; at < end; at++) {
      const int64_t b = at / rows;
      const char* token = Token(call.x, call.shape, b, at % rows).read(buffer);
      const float* mean = call.mean ? call.mean + b * call.mean_batch : nullptr;
      for (int64_t h = 0; h < heads; h++) {
        char* codes = static_cast<char*>(call.codes) + (at * heads + h) * dim;
        const float largest = centred(token + h * dim * size, mean ? mean + h * dim : nullptr, dim, values.data());
        float scale = largest / limit;
        scale = scale < FP32_TINY ? 1.0f : scale;
        call.scale[at * heads + h] = scale;
        if (call.dtype == Dtype::e4m3) {
          auto* to = reinterpret_cast<uint8_t*>(codes);
          if (std::isfinite(scale)) {
            encode_finite_e4m3(values.data(), 1.0f / scale, dim, to);
          } else {
            encode_e4m3(values.data(), 1.0f / scale, dim, to);
          }
        } else if (std::isfinite(scale)) {
          encode_int8(values.data(), 1.0f / scale, dim, reinterpret_cast<int8_t*>(codes));
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
    Floats source(width);
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
      decode(call, b, i, from, source.data());
      if (!(a >= 1)) to.read(to_buffer);  // to where `result` is: the buffer keeps its size, and so its place
      with_floating(call.to.dtype, [&](auto dtype) {
        using To = decltype(dtype);
        a >= 1 ? narrow<To>(source.data(), width, result) : lerp<To>(source.data(), a, width, result);
      });
      to.written(result);
    }
  });
}

}  // namespace kvlock::cpu
