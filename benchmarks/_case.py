"""What a benchmark measures: a call at a model's shape, the bytes it must move, who does it, and when it is right."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvlock_kernels
from kvlock_kernels import _cuda, info

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}
RUN = 80  # tokens in a row of a 720p video; the background index comes in runs of about this length

Inputs = dict[str, Any]  # the arguments of an operator by name
Outputs = tuple[Tensor, ...]


class Shape(NamedTuple):
    """A model's attention: tokens on a grid of frames, rows and columns, H heads of D elements."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    dim: int = 128
    channels: int = 16  # of the latents
    patch: int = 2  # rows and columns of the latents that one token stands for

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def latents(self) -> tuple[int, ...]:
        """One sample of the model's latents."""
        frames, rows, columns = self.grid
        return 1, self.channels, frames, self.patch * rows, self.patch * columns


WAN_1_3B_480P = Shape("wan-1.3b-480p", (21, 30, 52), 12)
WAN_1_3B_720P = Shape("wan-1.3b-720p", (21, 45, 80), 12)
WAN_14B_480P = Shape("wan-14b-480p", (21, 30, 52), 40)
WAN_14B_720P = Shape("wan-14b-720p", (21, 45, 80), 40)
WAN_5B_480P = Shape("wan-5b-480p", (21, 15, 26), 24, channels=48)
COGVIDEOX_2B = Shape("cogvideox-2b", (13, 30, 45), 30, 64)  # the tokens of the video; those of the prompt join them
LTX = Shape("ltx", (21, 16, 22), 32, 64, channels=128, patch=1)  # 161 frames of 512 x 704
SMALL_H12 = Shape("small-h12", (4, 32, 32), 12)
SMALL_H40 = Shape("small-h40", (4, 32, 32), 40)
SHAPES = (
    WAN_1_3B_480P, WAN_1_3B_720P, WAN_14B_480P, WAN_14B_720P, WAN_5B_480P, COGVIDEOX_2B, LTX, SMALL_H12, SMALL_H40,
)  # fmt: skip
TINY = Shape("tiny", (2, 4, 10), 3, 16)  # one run of tokens, for a CPU


class Rates(NamedTuple):
    """What a prediction assumes of a GPU: it is the bytes or the FLOP of a call over this."""

    bandwidth: float  # bytes a second: nine tenths of the specification
    products: float  # FLOP a second: near what cuDNN publishes for attention


# By torch's name for a GPU. Of another, predictions assume what its own copy and product of matrices reach.
RATES = {"NVIDIA H100 80GB HBM3": Rates(3.0e12, 6.5e14), "NVIDIA H200": Rates(4.3e12, 7e14)}
TARGET_GPU = "NVIDIA H200"  # what predictions are for where no GPU is asked for


class Traffic(NamedTuple):
    """The fewest bytes a call moves: of each input read once and of each output written once."""

    elements: int
    terms: tuple[tuple[float, str], ...]  # bytes an element, and what they are

    @property
    def unit(self) -> str:
        return "GB/s"

    @property
    def per_unit(self) -> float:
        return 1e9

    @property
    def amount(self) -> float:
        """Bytes."""
        return self.elements * self.per_element

    @property
    def per_element(self) -> float:
        return sum(size for size, _ in self.terms)

    @property
    def formula(self) -> str:
        return " + ".join(f"{size:.3g} {what}" for size, what in self.terms) or "0"

    def predicted_us(self, gpu: Rates) -> float:
        return 1e6 * self.amount / gpu.bandwidth


class Products(NamedTuple):
    """The floating-point operations of a call that is bound by them."""

    amount: float
    formula: str

    @property
    def unit(self) -> str:
        return "TFLOP/s"

    @property
    def per_unit(self) -> float:
        return 1e12

    def predicted_us(self, gpu: Rates) -> float:
        return 1e6 * self.amount / gpu.products


class NotInstalled(ImportError):
    """The library of a provider is not there."""


class Check(NamedTuple):
    """How far a result is from the formula in fp64."""

    error: float  # the largest, over the largest exact value
    allowed: float
    relative: float = math.nan  # the norm of the error over that of the exact values

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


class Provider(NamedTuple):
    """Somebody who computes the operator; in-place ones change their inputs and return what they changed."""

    name: str
    run: Callable[[Inputs], Outputs]
    compiled: bool = False  # run through torch.compile
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs  # for one who serves only some inputs
    needs_gpu: bool = False
    roundings: int = 1  # to the result's dtype on the way; the check allows as many times the error of one
    libraries: tuple[str, ...] = ()  # whose versions a row states, see `_machine.libraries`
    over: str = ""  # the provider of plain attention whose time this one's is set against


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one operator."""

    op: str
    shape: Shape
    dtype: str
    source: str  # how source rows are stored, or blank
    setting: str  # what else tells the case from its neighbours
    make: Callable[[Shape, str, int], Inputs]  # from shape, device and seed
    work: Callable[[Shape], Traffic | Products]
    check: Callable[[Inputs, Outputs], Check]  # from untouched inputs and the result for them
    providers: tuple[Provider, ...]
    first: Callable[[Shape], Traffic] | None = None  # what moves before the products of `work`
    core: tuple[str, ...] = ()  # its providers in the core
    offline: bool = False  # of the table of compiled kernels
    archs: tuple[int, ...] = (80, 89, 90)  # what it is compiled for there
    wide: bool = True  # its threads load and store 128 bits; not a few numbers, nor by the tensor memory accelerator
    launch: Callable[..., Any] | None = None  # what the table compiles instead of the operator's own launcher

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells the case from the others: operator, shape, source and setting."""
        return self.op, self.shape.name, self.source, self.setting

    def row_key(self, provider: Provider) -> tuple[str, str, str, str, str]:
        """What tells its row by a provider from the others of a run, see `_harness.key`."""
        return self.op, provider.name, self.shape.name, self.source, self.setting

    @property
    def name(self) -> str:
        return f"{self.op}-H{self.shape.heads}-{self.source}" if self.source else f"{self.op}-{self.dtype}"

    def by(self, name: str) -> "Case":
        """The case with those of its providers that have `name` in their own."""
        return dataclasses.replace(self, providers=tuple(p for p in self.providers if name in p.name))

    def short(self) -> "Case":
        """The case with its providers in the core."""
        return dataclasses.replace(self, providers=tuple(p for p in self.providers if p.name in self.core))

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.shape.name, self.setting)))


def ours(op: str) -> Provider:
    """The public operator."""
    function = getattr(kvlock_kernels, op)
    return Provider("kvlock", lambda inputs: outputs(function(**inputs)), libraries=("kvlock",))


def served_by_triton(op: str, *changed: str) -> Provider:
    """The operator's Triton kernel, whatever else serves the operator; `changed` as in `formula`."""

    def run(inputs: Inputs) -> Outputs:
        return outputs(_cuda.launchers()[op](**inputs)) + tuple(inputs[name] for name in changed)

    return Provider("Triton", run, needs_gpu=True, libraries=("triton",))


def served_by_extension(op: str, *changed: str) -> Provider:
    """The operator without the checks of its public face, where the extension has code for it on this GPU.

    Elsewhere `prepare`, which is not timed, raises.
    """
    function = getattr(torch.ops.kvlock_kernels, op)

    def served(inputs: Inputs) -> Inputs:
        by = info.on_cuda(op, 0)
        if not by.startswith("extension"):
            raise RuntimeError(f"not served by the extension: {by}")
        return inputs

    def run(inputs: Inputs) -> Outputs:
        return outputs(function(**inputs)) + tuple(inputs[name] for name in changed)

    return Provider("C++", run, prepare=served, needs_gpu=True, libraries=("kvlock",))


def formula(function: Callable[..., Any], *changed: str) -> tuple[Provider, Provider]:
    """Plain PyTorch, eager and to be compiled; `changed` names the arguments that an in-place function changes."""

    def run(inputs: Inputs) -> Outputs:
        result = outputs(function(**inputs))
        return result + tuple(inputs[name] for name in changed)

    eager = Provider("eager", run, libraries=("torch",))
    return eager, eager._replace(name="torch.compile", compiled=True)


def outputs(result: Any) -> Outputs:
    """The tensors of a result: one, several or none."""
    if isinstance(result, Tensor):
        return (result,)
    return tuple(value for value in result or () if isinstance(value, Tensor))


def close(actual: Outputs, exact: Outputs, steps: float) -> Check:
    """Wants every result within `steps` roundings of the largest exact value; gives the result that is worst."""
    checks = []
    for value, wanted in zip(actual, exact, strict=True):
        distance = value.double() - wanted
        error, relative = distance.abs().max() / wanted.abs().max(), distance.norm() / wanted.norm()
        checks.append(Check(error.item(), steps * torch.finfo(value.dtype).eps, relative.item()))
    return worst(checks)


def worst(checks: list[Check]) -> Check:
    """One that failed, or the one nearest to failing, with the largest relative error of all."""
    nearest = max(checks, key=lambda check: (not check.passed, check.error / check.allowed))
    return nearest._replace(relative=max(check.relative for check in checks))


def normal(*shape: int, device: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers; on the meta device only their shape."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def background(shape: Shape, share: float, device: str) -> Tensor:
    """The index of a background that is `share` of all tokens: of each run, the first ones."""
    token = torch.arange(shape.tokens, dtype=torch.int32)
    return token[token % RUN < round(share * RUN)].to(device)  # as long on the meta device as anywhere


def background_rows(shape: Shape, share: float) -> int:
    """The length of that index."""
    return background(shape, share, "cpu").shape[0]
