// CUDA's implementation. A thread takes 8 elements, 16 bytes of bf16, of the same place in TOKENS rows, and asks for
// all of them before it uses one: loads in flight are what a pass over memory lives on. 8 codes are half an access: two
// lanes side by side move 16 codes of every other row each, and exchange halves. Built with -fmad=false, because the
// bits are those of the reference.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "eight.cuh"
#include "pack_kv.h"

namespace kvlock::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int TOKENS = 4;  // 32 elements a thread
constexpr int WARP = 32;

template <class T>
__device__ T* row_of(const Rows& rows, int64_t b, int64_t token, int64_t h) {
  return static_cast<T*>(rows.data) + b * rows.batch + token * rows.token + h * rows.head;
}

__device__ int64_t token_of(const Rows& rows, int64_t i) { return rows.index ? rows.index[i] : i; }

// The tokens of TOKENS rows from the first on, all asked for at once; beyond the end, that of the last row again.
__device__ void tokens_of(const Rows& rows, int64_t first, int64_t end, int64_t (&token)[TOKENS]) {
#pragma unroll
  for (int j = 0; j < TOKENS; j++) token[j] = token_of(rows, min(first + j, end - 1));
}

__device__ float larger_or_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}

__device__ float largest(const float (&x)[8]) {
  float found = fabsf(x[0]);
  for (int k = 1; k < 8; k++) found = larger_or_nan(found, fabsf(x[k]));
  return found;
}

__device__ float larger_of_lanes(float x, int apart) {
  return larger_or_nan(x, __shfl_xor_sync(~0u, x, apart));
}

// The largest x[j] of LANES lanes, for row j = lane % TOKENS: half the rows change hands, then a quarter, then the
// lanes of one row compare.
template <int LANES>
__device__ float largest_of_rows(const float (&x)[TOKENS]) {
  static_assert(TOKENS == 4 && LANES >= TOKENS);
  const bool odd = in_odd_lane(), upper = threadIdx.x & 2;
  const float low = larger_or_nan(odd ? x[1] : x[0], __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1));
  const float high = larger_or_nan(odd ? x[3] : x[2], __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1));
  float found = larger_or_nan(upper ? high : low, __shfl_xor_sync(~0u, upper ? low : high, 2));
  for (int apart = TOKENS; apart < LANES; apart *= 2) found = larger_of_lanes(found, apart);
  return found;
}

template <class Code>
__device__ float scale_of(float largest) {
  constexpr float limit = std::is_same_v<Code, e4m3> ? E4M3_LIMIT : INT8_LIMIT;
  const float scale = __fdiv_rn(largest, limit);
  return scale < FP32_TINY ? 1.0f : scale;
}

template <class Code>
__device__ Eight<Code> encoded(float (&x)[8], float inverse) {
  for (int k = 0; k < 8; k++) x[k] *= inverse;
  Eight<Code> codes;
  narrow(x, codes);
  // A cast of NaN gives 0. The inverse is 0 or NaN where the scale is inf or NaN.
  if (std::is_same_v<Code, int8> && !(inverse > 0)) codes.word[0] = codes.word[1] = 0;
  return codes;
}

// Rows of which 8 elements lie side by side: LANES threads take one head, 8 * LANES >= D, of TOKENS rows. A sample has
// `blocks` blocks; samples follow each other in grid.x, the one axis that has room for any number of them.
template <class T, class Code, int LANES, bool PAIRS>
__global__ void __launch_bounds__(THREADS) encode_kernel(const Encode call, uint32_t blocks) {
  const auto [samples, rows, heads, dim] = call.shape;
  const uint32_t thread = blockIdx.x % blocks * THREADS + threadIdx.x, unit = thread / LANES;
  const uint32_t tile = unit / static_cast<uint32_t>(heads), h = unit % static_cast<uint32_t>(heads);
  const int64_t b = blockIdx.x / blocks, first = static_cast<int64_t>(tile) * TOKENS;
  const int d = thread % LANES * 8;

  const bool inside = d < dim;
  const int from = inside ? d : 0;  // what is read twice, beyond the end of a row or of all, changes no largest element
  int64_t token[TOKENS];
  tokens_of(call.x, first, rows, token);
  Eight<T> raw[TOKENS];
#pragma unroll
  for (int j = 0; j < TOKENS; j++) raw[j] = load<true>(row_of<T>(call.x, b, token[j], h), 1, from, dim);
  float mean[8] = {};
  if (call.mean) load_mean<true>(call.mean, b * call.mean_batch + h * dim, from, dim, mean);
  float x[TOKENS][8], largest_of_row[TOKENS];
#pragma unroll
  for (int j = 0; j < TOKENS; j++) {
    widen(raw[j], x[j]);
    for (int k = 0; k < 8; k++) x[j][k] -= mean[k];  // without a mean, -0 - 0 is -0
    largest_of_row[j] = largest(x[j]);
  }
  // One division for each row, in one of its lanes.
  const float scale = scale_of<Code>(largest_of_rows<LANES>(largest_of_row)), inverse = __frcp_rn(scale);
  const int64_t at = (b * rows + first) * heads + h;
  const int lane = thread % LANES;
  if (lane < TOKENS && first + lane < rows) call.scale[at + lane * heads] = scale;
  Eight<Code> codes[TOKENS];
#pragma unroll
  for (int j = 0; j < TOKENS; j++) codes[j] = encoded<Code>(x[j], __shfl_sync(~0u, inverse, j, LANES));
  Code* row = static_cast<Code*>(call.codes) + at * dim;
#pragma unroll
  for (int j = 0; j < TOKENS; j++) {
    if constexpr (!PAIRS) {
      if (inside && first + j < rows) store<true>(codes[j], row + j * heads * dim, 1, d, dim);
    } else if (j % 2 == 0) {
      exchange(codes[j], codes[j + 1]);
      const int i = j + in_odd_lane();
      if (inside && first + i < rows) store_sixteen(codes[j], codes[j + 1], row + i * heads * dim, d);
    }
  }
}

// Any rows: a warp takes one head of one row and reads it twice.
template <class T, class Code>
__global__ void __launch_bounds__(THREADS) encode_any_kernel(const Encode call, uint32_t blocks) {
  const auto [samples, rows, heads, dim] = call.shape;
  const int64_t warp = static_cast<int64_t>(blockIdx.x % blocks) * (THREADS / WARP) + threadIdx.x / WARP;
  const int64_t b = blockIdx.x / blocks, i = warp / heads, h = warp % heads, at = (b * rows + i) * heads + h;
  if (i >= rows) return;
  const int64_t token = token_of(call.x, i);
  const auto centred = [&](int64_t d, float(&x)[8]) {
    widen(load<false>(row_of<T>(call.x, b, token, h), call.x.element, d, dim), x);
    if (!call.mean) return;
    float mean[8];
    load_mean<false>(call.mean, b * call.mean_batch + h * dim, d, dim, mean);
    for (int k = 0; k < 8; k++) x[k] -= mean[k];
  };
  const int64_t start = threadIdx.x % WARP * 8, step = WARP * 8;
  float x[8], found = 0;
  for (int64_t d = start; d < dim; d += step) centred(d, x), found = larger_or_nan(found, largest(x));
  for (int apart = 1; apart < WARP; apart *= 2) found = larger_of_lanes(found, apart);
  const float scale = scale_of<Code>(found), inverse = __frcp_rn(scale);
  if (start == 0) call.scale[at] = scale;
  for (int64_t d = start; d < dim; d += step) {
    centred(d, x);
    store<false>(encoded<Code>(x, inverse), static_cast<Code*>(call.codes) + at * dim, 1, d, dim);
  }
}

// Each thread takes one column of 8 elements of TOKENS rows. Blocks of all samples beside each other share a source.
// With PAIRS a head has an even number of columns: lanes that exchange have the same rows, and leave early together.
template <class To, class From, bool WIDE, bool PAIRS>
__global__ void __launch_bounds__(THREADS) mix_kernel(const Mix call, uint32_t chunks) {
  const auto [samples, rows, heads, dim] = call.shape;
  const uint32_t columns = static_cast<uint32_t>(heads) * chunks, b = blockIdx.x % static_cast<uint32_t>(samples);
  const uint32_t thread = blockIdx.x / static_cast<uint32_t>(samples) * THREADS + threadIdx.x;
  const uint32_t tile = thread / columns, column = thread % columns, h = column / chunks;
  const int64_t d = column % chunks * 8, first = static_cast<int64_t>(tile) * TOKENS;
  const float a = call.ratio ? call.ratio[b] : 1.0f;
  if (a <= 0 || first >= rows) return;

  const bool whole = a >= 1;
  int64_t to_token[TOKENS], from_token[TOKENS];
  tokens_of(call.to, first, rows, to_token);
  tokens_of(call.from, first, rows, from_token);
  Eight<From> raw[TOKENS];
  Eight<To> old[TOKENS] = {};
  float scale[TOKENS];
#pragma unroll
  for (int j = 0; j < TOKENS; j++) {
    const int64_t i = min(first + j, rows - 1);
    if constexpr (!PAIRS) {
      raw[j] = load<WIDE>(row_of<From>(call.from, b, from_token[j], h), call.from.element, d, dim);
    } else if (j % 2 == 0) {
      const int64_t token = in_odd_lane() ? from_token[j + 1] : from_token[j];
      load_sixteen(row_of<From>(call.from, b, token, h), d, raw[j], raw[j + 1]);
    }
    if constexpr (sizeof(From) == 1) scale[j] = call.scale[b * call.scale_batch + i * heads + h];
    if (!whole) old[j] = load<WIDE>(row_of<To>(call.to, b, to_token[j], h), call.to.element, d, dim);
  }
  float mean[8] = {};
  if (sizeof(From) == 1 && call.mean) load_mean<WIDE>(call.mean, b * call.mean_batch + h * dim, d, dim, mean);
  if constexpr (PAIRS) {
#pragma unroll
    for (int j = 0; j < TOKENS; j += 2) exchange(raw[j], raw[j + 1]);
  }
#pragma unroll
  for (int j = 0; j < TOKENS; j++) {
    if (first + j >= rows) continue;
    To* to = row_of<To>(call.to, b, to_token[j], h);
    if constexpr (std::is_same_v<To, From>) {
      if (whole) {  // also the payload of a NaN
        store<WIDE>(raw[j], to, call.to.element, d, dim);
        continue;
      }
    }
    float s[8], x[8];
    widen(raw[j], s);
    if constexpr (sizeof(From) == 1) {
      for (int k = 0; k < 8; k++) s[k] *= scale[j];
      if (call.mean) {
        for (int k = 0; k < 8; k++) s[k] += mean[k];
      }
    }
    if (!whole) {
      widen(old[j], x);
      for (int k = 0; k < 8; k++) s[k] = (1.0f - a) * x[k] + a * s[k];
    }
    Eight<To> result;
    narrow(s, result);
    store<WIDE>(result, to, call.to.element, d, dim);
  }
}

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether so many elements of any row, from a multiple of as many on, are aligned accesses of at most 16 bytes.
bool wide(const Rows& rows, int64_t dim, int64_t elements = 8) {
  const int64_t size = size_of(rows.dtype), access = std::min(elements * size, INT64_C(16)), step = access / size;
  return rows.element == 1 && dim % elements == 0 && aligned(rows.data, access) && rows.batch % step == 0 &&
         rows.token % step == 0 && rows.head % step == 0;
}

// Calls function with a value of the type behind dtype.
template <class Function>
auto with_floating(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::bf16: return function(__nv_bfloat16{});
    case Dtype::fp16: return function(__half{});
    default: return function(float{});
  }
}

template <class Function>
auto with_any(Dtype dtype, Function function) {
  if (dtype == Dtype::int8) return function(int8{});
  if (dtype == Dtype::e4m3) return function(e4m3{});
  return with_floating(dtype, function);
}

// The blocks of all samples are numbered in 31 bits, the threads of one sample in 32.
const char* too_many(int64_t blocks, int64_t samples) {
  const bool fits = blocks * THREADS <= INT64_C(1) << 32 && blocks * samples < INT64_C(1) << 31;
  return fits ? nullptr : "found too many rows for one launch, wanted fewer samples, rows or heads";
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, class Code>
const char* launch_encode(const Encode& call, cudaStream_t stream) {
  const Shape& shape = call.shape;
  const auto launch = [&](auto kernel, int64_t threads) {
    const int64_t blocks = blocks_of(threads, THREADS);
    if (const char* error = too_many(blocks, shape.samples)) return error;
    kernel<<<blocks * shape.samples, THREADS, 0, stream>>>(call, blocks);
    return launched();
  };
  const int64_t units = blocks_of(shape.rows, TOKENS) * shape.heads;
  if (!wide(call.x, shape.dim) || !aligned(call.mean, 16) || shape.dim > 8 * WARP) {
    return launch(encode_any_kernel<T, Code>, shape.rows * shape.heads * WARP);
  }
  const auto launch_wide = [&](auto pairs) {
    constexpr bool PAIRS = decltype(pairs)::value;
    if (shape.dim > 128) return launch(encode_kernel<T, Code, 32, PAIRS>, units * 32);
    if (shape.dim > 64) return launch(encode_kernel<T, Code, 16, PAIRS>, units * 16);
    if (shape.dim > 32) return launch(encode_kernel<T, Code, 8, PAIRS>, units * 8);
    return launch(encode_kernel<T, Code, 4, PAIRS>, units * 4);
  };
  // The codes are a new tensor, which begins where 16 bytes are aligned.
  return shape.dim % 16 == 0 ? launch_wide(std::true_type{}) : launch_wide(std::false_type{});
}

}  // namespace

bool has_code_for_current_device() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, mix_kernel<float, float, true, false>) == cudaSuccess;
  cudaGetLastError();  // forgets the error, which the launch of another kernel would take for its own
  return found;
}

const char* encode(const Encode& call, void* stream) {
  return with_floating(call.x.dtype, [&](auto x) {
    const auto launch = [&](auto code) {
      return launch_encode<decltype(x), decltype(code)>(call, static_cast<cudaStream_t>(stream));
    };
    return call.dtype == Dtype::int8 ? launch(int8{}) : launch(e4m3{});
  });
}

const char* mix(const Mix& call, void* stream) {
  const Shape& shape = call.shape;
  const bool is_wide = wide(call.to, shape.dim) && wide(call.from, shape.dim) && aligned(call.mean, 16);
  const bool in_pairs = is_wide && wide(call.from, shape.dim, 16);
  const int64_t chunks = blocks_of(shape.dim, 8);
  const int64_t blocks = blocks_of(blocks_of(shape.rows, TOKENS) * shape.heads * chunks, THREADS);
  if (const char* error = too_many(blocks, shape.samples)) return error;
  with_floating(call.to.dtype, [&](auto to) {
    with_any(call.from.dtype, [&](auto from) {
      using To = decltype(to);
      using From = decltype(from);
      constexpr bool PAIRS = sizeof(From) == 1;
      const auto kernel = in_pairs  ? mix_kernel<To, From, true, PAIRS>
                          : is_wide ? mix_kernel<To, From, true, false>
                                    : mix_kernel<To, From, false, false>;
      kernel<<<blocks * shape.samples, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(call, chunks);
    });
  });
  return launched();
}

}  // namespace kvlock::cuda
