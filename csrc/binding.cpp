// pack_kv, unpack_kv, kv_lerp_ and kv_lerp_pair_ for the CPU and, where nvcc built its part, the first three for CUDA.
//
// Adds implementations to the contracts in kvlock_kernels/_ops.py, which owns the schemas, through torch's stable ABI:
// one object for every version of torch from 2.10 on and for every version of Python.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "pack_kv.h"

#ifndef KVLOCK_ARCHITECTURES
#define KVLOCK_ARCHITECTURES ""  // no CUDA part
#endif

namespace kvlock {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

Dtype dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::fp32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    case ScalarType::Char: return Dtype::int8;
    case ScalarType::Float8_e4m3fn: return Dtype::e4m3;
    default:
      STD_TORCH_CHECK(false, name, ": found dtype number ", static_cast<int>(type),
                      ", wanted float32, bfloat16, float16, int8 or float8_e4m3fn");
  }
}

bool eight_bit(Dtype dtype) { return size_of(dtype) == 1; }

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// An argument that a kernel reads as [sizes] without strides: contiguous, on the device of x.
Tensor dense(const char* name, const Tensor& value, ScalarType type, std::initializer_list<int64_t> sizes,
             const Tensor& x) {
  STD_TORCH_CHECK(value.scalar_type() == type, name, ": found dtype number ", static_cast<int>(value.scalar_type()),
                  ", wanted ", type == ScalarType::Int ? "int32" : "float32");
  const auto found = value.sizes();
  STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()), name,
                  ": found shape ", shape_text(found), ", wanted ", shape_text(sizes));
  STD_TORCH_CHECK(value.is_cuda() == x.is_cuda() && value.get_device_index() == x.get_device_index(), name,
                  ": found device ", value.get_device_index(), ", wanted that of the rows, ", x.get_device_index());
  return torch::stable::contiguous(value);
}

// The first axis of a mean or of source rows is 1, where all samples share it, or B.
int64_t sharing(const char* name, const Tensor& value, int64_t samples) {
  STD_TORCH_CHECK(value.dim() > 0 && (value.size(0) == 1 || value.size(0) == samples), name, ": found ",
                  value.dim() > 0 ? value.size(0) : 0, " samples, wanted 1 or ", samples);
  return value.size(0);
}

const float* floats(const Maybe& value) {
  return value ? static_cast<const float*>(value->const_data_ptr()) : nullptr;
}

// x [B, N, H, D], or [B, N, C] seen with `heads` heads.
Rows rows_of(const char* name, const Tensor& x, int64_t heads, int64_t dim, const int32_t* index) {
  const bool flat = x.dim() == 3;
  STD_TORCH_CHECK(flat ? x.size(2) == heads * dim : x.size(2) == heads && x.size(3) == dim, name, ": found shape ",
                  shape_text(x.sizes()), ", wanted [.., .., H, D] or [.., .., H * D] with H, D = ", heads, ", ", dim);
  const int64_t element = x.stride(flat ? 2 : 3);
  return {x.data_ptr(), dtype_of(name, x.scalar_type()), x.size(0) == 1 ? 0 : x.stride(0), x.stride(1),
          flat ? dim * element : x.stride(2), element, index};
}

// On the CPU a row out of range is seen before it is a wild access; on CUDA, looking would wait for the device.
const int32_t* checked(const Tensor& index, int64_t tokens) {
  const auto* row = static_cast<const int32_t*>(index.const_data_ptr());
  for (int64_t i = 0; index.is_cpu() && i < index.numel(); i++) {
    STD_TORCH_CHECK(row[i] >= 0 && row[i] < tokens, "index: found ", row[i], " for row ", i,
                    ", wanted at least 0 and below N = ", tokens);
  }
  return row;
}

struct Cpu {
  static void run(const Encode& call, const Tensor&) { cpu::encode(call); }
  static void run(const Mix& call, const Tensor&) { cpu::mix(call); }
};

// See `kvlock_kernels.pack_kv`.
template <class Device>
std::tuple<Tensor, Tensor> pack_kv(Tensor x, Tensor index, ScalarType type, Maybe mean) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) > 0, "x: found shape ", shape_text(x.sizes()),
                  ", wanted [B, N, H, D] with D >= 1");
  const Dtype dtype = dtype_of("dtype", type);
  STD_TORCH_CHECK(!mean || eight_bit(dtype), "mean: found a value, wanted None beside a dtype that is not 8-bit");
  index = dense("index", index, ScalarType::Int, {index.numel()}, x);
  const Shape shape{x.size(0), index.numel(), x.size(2), x.size(3)};
  const auto& [b, rows, h, d] = shape;
  if (mean) mean = dense("mean", *mean, ScalarType::Float, {sharing("mean", *mean, b), h, d}, x);

  const std::array<int64_t, 4> sizes{b, rows, h, d};
  Tensor data = torch::stable::new_empty(x, {sizes.data(), 4}, type);
  const std::array<int64_t, 3> scale_sizes = eight_bit(dtype) ? std::array{b, rows, h} : std::array<int64_t, 3>{0};
  Tensor scale = torch::stable::new_empty(x, {scale_sizes.data(), eight_bit(dtype) ? size_t{3} : 1}, ScalarType::Float);
  if (data.numel() == 0) return {data, scale};

  const Rows from = rows_of("x", x, h, d, checked(index, x.size(1)));
  STD_TORCH_CHECK(!eight_bit(from.dtype), "x: found an 8-bit dtype, wanted float32, bfloat16 or float16");
  if (eight_bit(dtype)) {
    Device::run(Encode{shape, from, floats(mean), mean && mean->size(0) > 1 ? h * d : 0, dtype, data.data_ptr(),
                       static_cast<float*>(scale.data_ptr())}, x);
  } else {
    Device::run(Mix{shape, rows_of("data", data, h, d, nullptr), from, nullptr, 0, nullptr, 0, nullptr}, x);
  }
  return {data, scale};
}

// The shared end of unpack_kv and kv_lerp_: rows `from`, decoded, mixed into rows `to`.
template <class Device>
void mix(const Shape& shape, const Rows& to, const Rows& from, const Tensor& source, Maybe scale, Maybe mean,
         const float* ratio) {
  const auto& [b, rows, h, d] = shape;
  STD_TORCH_CHECK(eight_bit(from.dtype) == scale.has_value(), "scale: found ", scale ? "a value" : "None", ", wanted ",
                  scale ? "None beside rows that are not 8-bit" : "a value beside 8-bit rows");
  STD_TORCH_CHECK(!mean || scale, "mean: found a value, wanted None beside rows that are not 8-bit");
  const int64_t samples = source.size(0);
  if (scale) scale = dense("scale", *scale, ScalarType::Float, {samples, rows, h}, source);
  if (mean) mean = dense("mean", *mean, ScalarType::Float, {sharing("mean", *mean, samples), h, d}, source);
  Device::run(Mix{shape, to, from, floats(scale), samples > 1 ? rows * h : 0, floats(mean),
                  mean && mean->size(0) > 1 ? h * d : 0, ratio}, source);
}

// See `kvlock_kernels.unpack_kv`.
template <class Device>
Tensor unpack_kv(Tensor data, Maybe scale, Maybe mean, ScalarType type) {
  STD_TORCH_CHECK(data.dim() == 4, "data: found shape ", shape_text(data.sizes()), ", wanted [B, rows, H, D]");
  STD_TORCH_CHECK(!eight_bit(dtype_of("dtype", type)), "dtype: found an 8-bit dtype, wanted a floating one");
  Tensor out = torch::stable::new_empty(data, data.sizes(), type);
  if (out.numel() == 0) return out;
  const int64_t h = data.size(2), d = data.size(3);
  mix<Device>({data.size(0), data.size(1), h, d}, rows_of("out", out, h, d, nullptr),
              rows_of("data", data, h, d, nullptr), data, scale, mean, nullptr);
  return out;
}

// See `kvlock_kernels.kv_lerp_`.
template <class Device>
void kv_lerp_(Tensor x, Tensor source, Tensor index, Tensor ratio, Maybe scale, Maybe mean) {
  STD_TORCH_CHECK(x.dim() == 3 || x.dim() == 4, "x: found shape ", shape_text(x.sizes()),
                  ", wanted [B, N, H, D] or [B, N, C]");
  STD_TORCH_CHECK(source.dim() == 3 || source.dim() == 4, "source: found shape ", shape_text(source.sizes()),
                  ", wanted [Bs, rows, H, D] or [Bs, rows, C]");
  const int64_t b = x.size(0), rows = index.numel();
  index = dense("index", index, ScalarType::Int, {rows}, x);
  ratio = dense("ratio", ratio, ScalarType::Float, {b}, x);
  STD_TORCH_CHECK(source.is_cuda() == x.is_cuda() && source.get_device_index() == x.get_device_index(),
                  "source: found device ", source.get_device_index(), ", wanted that of x, ", x.get_device_index());
  sharing("source", source, b);
  STD_TORCH_CHECK(source.size(1) == rows, "source: found ", source.size(1), " rows, wanted ", rows);
  if (x.numel() == 0 || rows == 0) return;

  const Tensor& with_heads = x.dim() == 4 ? x : source;
  const bool flat = with_heads.dim() == 3;
  const int64_t h = flat ? 1 : with_heads.size(2), d = with_heads.size(flat ? 2 : 3);
  const Rows to = rows_of("x", x, h, d, checked(index, x.size(1)));
  STD_TORCH_CHECK(!eight_bit(to.dtype), "x: found an 8-bit dtype, wanted float32, bfloat16 or float16");
  mix<Device>({b, rows, h, d}, to, rows_of("source", source, h, d, nullptr), source, scale, mean,
              static_cast<const float*>(ratio.const_data_ptr()));
}

// See `kvlock_kernels.kv_lerp_pair_`.
void kv_lerp_pair_(Tensor k, Tensor v, Tensor k_source, Tensor v_source, Tensor index, Tensor ratio, Maybe k_scale,
                   Maybe v_scale, Maybe k_mean, Maybe v_mean) {
  kv_lerp_<Cpu>(k, k_source, index, ratio, k_scale, k_mean);
  kv_lerp_<Cpu>(v, v_source, index, ratio, v_scale, v_mean);
}

// The contracts that these functions are written for, letter for letter. `_extension.py` looks for them before it loads
// the object: nothing else would keep a function from arguments that it takes for others.
[[gnu::used]] constexpr char CONTRACTS[] =
    "kvlock_kernels\n"
    "pack_kv(Tensor x, Tensor index, ScalarType dtype, *, Tensor? mean=None) -> (Tensor, Tensor)\n"
    "unpack_kv(Tensor data, Tensor? scale, *, Tensor? mean=None, ScalarType dtype) -> Tensor\n"
    "kv_lerp_(Tensor(a!) x, Tensor source, Tensor index, Tensor ratio, *, "
    "Tensor? source_scale=None, Tensor? source_mean=None) -> ()\n"
    "kv_lerp_pair_(Tensor(a!) k, Tensor(b!) v, Tensor k_source, Tensor v_source, Tensor index, Tensor ratio, *, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? k_mean=None, Tensor? v_mean=None) -> ()";

STABLE_TORCH_LIBRARY_IMPL(kvlock_kernels, CPU, library) {
  library.impl("pack_kv", TORCH_BOX(&pack_kv<Cpu>));
  library.impl("unpack_kv", TORCH_BOX(&unpack_kv<Cpu>));
  library.impl("kv_lerp_", TORCH_BOX(&kv_lerp_<Cpu>));
  library.impl("kv_lerp_pair_", TORCH_BOX(&kv_lerp_pair_));
}

#ifdef KVLOCK_CUDA

// Only CUDA builds of torch have this function, so that it is looked up and the object loads into the others too.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

CurrentStream current_stream() {
  static const auto function = reinterpret_cast<CurrentStream>(
      dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream"));
  return function;
}

struct Cuda {
  static bool serves(int32_t device) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    return current_stream() != nullptr && cuda::has_code_for_current_device();
  }

  template <class Call, const char* (*launch)(const Call&, void*)>
  static void launched(const Call& call, const Tensor& x) {
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(device, &stream));
    const char* error = launch(call, stream);
    STD_TORCH_CHECK(error == nullptr, "CUDA device ", device, ": ", error);
  }

  static void run(const Encode& call, const Tensor& x) { launched<Encode, cuda::encode>(call, x); }
  static void run(const Mix& call, const Tensor& x) { launched<Mix, cuda::mix>(call, x); }
};

// The boxed function, or what Python registered beside it, `fallback`, on a GPU that there is no code for in here.
template <auto boxed, const char* fallback>
void where_built(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_device_index(torch::stable::detail::to<AtenTensorHandle>(stack[0]), &device));
  if (Cuda::serves(device)) {
    boxed(stack, inputs, outputs);
  } else {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(fallback, "", stack, TORCH_ABI_VERSION));
  }
}

constexpr char PACK_FALLBACK[] = "kvlock_kernels::fallback_pack_kv";
constexpr char UNPACK_FALLBACK[] = "kvlock_kernels::fallback_unpack_kv";
constexpr char LERP_FALLBACK[] = "kvlock_kernels::fallback_kv_lerp_";

STABLE_TORCH_LIBRARY_IMPL(kvlock_kernels, CUDA, library) {
  library.impl("pack_kv", where_built<TORCH_BOX(&pack_kv<Cuda>), PACK_FALLBACK>);
  library.impl("unpack_kv", where_built<TORCH_BOX(&unpack_kv<Cuda>), UNPACK_FALLBACK>);
  library.impl("kv_lerp_", where_built<TORCH_BOX(&kv_lerp_<Cuda>), LERP_FALLBACK>);
}

#endif

}  // namespace
}  // namespace kvlock

// What `python -m kvlock_kernels.info` asks.
extern "C" __attribute__((visibility("default"))) const char* kvlock_architectures() { return KVLOCK_ARCHITECTURES; }
extern "C" __attribute__((visibility("default"))) int kvlock_serves([[maybe_unused]] int device) {
#ifdef KVLOCK_CUDA
  try {
    return kvlock::Cuda::serves(device);
  } catch (...) {  // no such device; an exception must not leave a function of C
  }
#endif
  return 0;
}
