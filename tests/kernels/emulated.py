"""csrc/pack_kv.cu on the CPU: compiled with the headers of emulated_cuda/, called with tensors."""

import ctypes
import re
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

CSRC, HEADERS = Path(__file__).parents[2] / "csrc", Path(__file__).with_name("emulated_cuda")
FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fsanitize=alignment", f"-I{HEADERS}", f"-iquote{CSRC}"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)  # as in csrc/pack_kv.h
# What a C++ compiler does not read: the brackets of a launch, of which there are two, and an instruction in PTX.
NOT_CPP = (
    (r"kernel<<<(.+), THREADS, 0, .+>>>", r"emulated::launch(+kernel, \1, THREADS)", 2),
    (r'asm\("max\.NaN\.f32 .*"=f"\(larger\) : "f"\(x\), "f"\(y\)\)', "larger = max_nan(x, y)", 1),
)
BEYOND = 128  # rows that the threads of one block could write beyond the last row
C_INTERFACE = """
using namespace kvlock;
extern "C" const char* emulated_encode(const Encode* call) { return cuda::encode(*call, nullptr); }
extern "C" const char* emulated_mix(const Mix* call) { return cuda::mix(*call, nullptr); }
extern "C" int64_t emulated_shuffles() { return std::exchange(emulated::shuffles, 0); }
"""


class Shape(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("samples", "rows", "heads", "dim")]


class Rows(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("dtype", c_int), *((name, c_int64) for name in ("batch", "token", "head", "element")),
        ("index", c_void_p),
    ]  # fmt: skip


class Encode(ctypes.Structure):
    _fields_ = [
        ("shape", Shape), ("x", Rows), ("mean", c_void_p), ("mean_batch", c_int64), ("dtype", c_int),
        ("codes", c_void_p), ("scale", c_void_p),
    ]  # fmt: skip


class Mix(ctypes.Structure):
    _fields_ = [
        ("shape", Shape), ("to", Rows), ("source", Rows), ("scale", c_void_p), ("scale_batch", c_int64),
        ("mean", c_void_p), ("mean_batch", c_int64), ("ratio", c_void_p),
    ]  # fmt: skip


class Emulated:
    """The kernels, as csrc/binding.cpp calls them, with all checks left out."""

    def __init__(self, compiler: str, folder: Path) -> None:
        source, built = folder / "pack_kv.cpp", folder / "pack_kv.so"
        text = (CSRC / "pack_kv.cu").read_text()
        for pattern, replacement, times in NOT_CPP:
            text, found = re.subn(pattern, replacement, text)
            assert found == times, pattern
        source.write_text(text + C_INTERFACE)
        # Linked apart, because the headers have what a sanitizer calls.
        subprocess.run([compiler, *FLAGS, "-c", source, "-o", built.with_suffix(".o")], check=True)
        subprocess.run([compiler, "-shared", built.with_suffix(".o"), "-o", built], check=True)
        library = ctypes.CDLL(str(built))
        self._encode, self._mix, self._shuffles = (
            getattr(library, f"emulated_{name}") for name in ("encode", "mix", "shuffles")
        )
        self._encode.restype = self._mix.restype = c_char_p
        self._shuffles.restype = c_int64

    def shuffles(self) -> int:
        """How often the lanes of a warp met since the last call."""
        return self._shuffles()

    def pack_kv(self, x: Tensor, index: Tensor, dtype: torch.dtype, *, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        b, _, h, d = x.shape
        shape, last = Shape(b, len(index), h, d), b * len(index)
        codes, scale = torch.zeros(last + BEYOND, h, d, dtype=torch.uint8), torch.zeros(last + BEYOND, h)
        call = Encode(shape, rows(x, index), *shared(mean), DTYPES.index(dtype), codes.data_ptr(), scale.data_ptr())
        succeeds(self._encode(ctypes.byref(call)))
        assert not codes[last:].any() and not scale[last:].any(), "rows beyond the last one are written"
        return codes[:last].view(dtype).unflatten(0, (b, -1)), scale[:last].unflatten(0, (b, -1))

    def kv_lerp_(
        self, x: Tensor, source: Tensor, index: Tensor | None, ratio: Tensor | None, *,
        source_scale: Tensor | None, source_mean: Tensor | None,
    ) -> None:  # fmt: skip
        """Without an index, into the tokens as they lie; without a ratio, the source rows alone."""
        b, _, h, d = x.shape
        call = Mix(
            Shape(b, source.shape[1], h, d), rows(x, index), rows(source), *shared(source_scale), *shared(source_mean),
            pointer(ratio),
        )  # fmt: skip
        succeeds(self._mix(ctypes.byref(call)))


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def rows(x: Tensor, index: Tensor | None = None) -> Rows:
    batch, *strides = x.stride()
    return Rows(x.data_ptr(), DTYPES.index(x.dtype), batch if len(x) > 1 else 0, *strides, pointer(index))


def shared(value: Tensor | None) -> tuple[int | None, int]:
    """A dense scale or mean and its distance from one sample to the next."""
    return pointer(value), value.stride(0) if value is not None and len(value) > 1 else 0


def succeeds(error: bytes | None) -> None:
    assert error is None, error.decode()
