"""Compiles the kernels for GPUs that are not there, with the arguments the launchers pass, and reads the machine code.

The table goes to benchmarks/compiled.md with `python -m benchmarks.offline --write`.
"""

import argparse
import contextlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.__main__ import CASES
from benchmarks._case import Case
from benchmarks._machine_code import Instruction, disassembled, output_of, product_loop
from kvlock.cli.signals import ends_when_unread
from kvlock_kernels import _cuda

ARCHS = (80, 89, 90)
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a program may have
OFFLINE = tuple(case for case in CASES if case.offline)
PAGE = Path(__file__).with_name("compiled.md")
BEGIN, END = "<!-- begin: python -m benchmarks.offline --write -->", "<!-- end -->"


class Compiled(NamedTuple):
    """What a kernel became for one architecture."""

    case: str
    kernel: str
    arch: int
    registers: int
    spills: int  # loads and stores of local memory
    shared: int  # bytes
    instructions: int
    loads_128: int  # LDG instructions of 16 bytes a thread
    stores_128: int
    barriers: int
    a_tile: str  # instructions of the loop that multiplies on the tensor cores, where there is one
    fused: int  # products and sums in one rounding
    work_formula: str
    products: str  # the instruction of the tensor cores, if there is one
    atomics: int  # instructions on memory; what they add up has another order every time
    starts_early: bool  # launched under the end of the kernel before it
    waits: int  # instructions that wait for that end
    read_before: list[str]  # what it reads before it waits, by the names of its arguments

    @property
    def columns(self) -> tuple[Any, ...]:
        """What the table has of it for each architecture."""
        return (
            self.registers, self.spills, self.shared, self.instructions, self.loads_128, self.stores_128, self.barriers,
            self.a_tile,
        )  # fmt: skip


class AbsentGPU:
    """A Triton driver that knows a GPU by name only; each architecture is a device, with the JIT's cache of its own."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list[Any]]:
    """Inside, `kernel[grid](...)` compiles and launches nothing; gives the list that the compiled kernels join."""
    import triton
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if "enable_fp_fusion" not in kwargs:  # Triton 3.10 changes what it fuses where a launch does not say
            raise TypeError(f"the launch of {self.__name__} has no enable_fp_fusion; wanted True or False")
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    with (
        mock.patch.dict(vars(triton.runtime.driver)),  # restores the driver; asking for it would fail here
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=1)),
    ):
        triton.runtime.driver.set_active(AbsentGPU(arch))
        yield kernels


def compile_cases(cases: Iterable[Case]) -> list[tuple[Case, Compiled]]:
    """Each case with the kernels of a call of it, for each of its architectures, in the order of their launches."""
    found = [(case, arch, kernel) for case in cases for arch in case.archs for kernel in _launched(case, arch)]
    codes = disassembled([kernel for *_, kernel in found])
    return [(one[0], _inspected(*one, code)) for one, code in zip(found, codes, strict=True)]


def _launched(case: Case, arch: int) -> list[Any]:
    """Tensors are on the meta device, where they have shapes, strides and alignment."""
    inputs = case.make(case.shape, "meta", 0)
    with compiling_for(arch) as kernels:
        (case.launch or _cuda.launchers()[case.op])(**inputs)
    return kernels


def _inspected(case: Case, arch: int, kernel: Any, code: list[Instruction]) -> Compiled:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump says nothing of the registers of {kernel.metadata.name}: {usage!r}")
    opcodes = Counter(instruction.opcode for instruction in code)

    def count(name: str, width: str | None = None) -> int:
        parts = ((opcode.split("."), n) for opcode, n in opcodes.items())
        return sum(n for words, n in parts if words[0] == name and (width is None or width in words))

    return Compiled(
        case.name, kernel.metadata.name, arch, int(registers[1]), count("LDL") + count("STL"), kernel.metadata.shared,
        opcodes.total() - count("NOP"), count("LDG", "128"), count("STG", "128"), count("BAR"),
        product_loop(code), kernel.asm["ptx"].count("fma.rn.f32"), case.work(case.shape).formula,
        next((name for name in ("HGMMA", "HMMA") if count(name)), ""),
        sum(n for opcode, n in opcodes.items() if re.match("ATOM|RED(?!UX)", opcode)),
        kernel.metadata.launch_pdl, count("ACQBULK"), read_before_the_wait(kernel),
    )


def table(kernels: list[Compiled], triton_version: str) -> str:
    """The Markdown table: a line for each kernel of each case, its numbers for the three architectures."""
    lines = [
        f"Triton {triton_version}; sm_80 / sm_89 / sm_90 in each cell.",
        "",
        "| case | kernel | bytes an element, or FLOP | registers | spills | shared bytes | instructions "
        "| 128-bit loads | 128-bit stores | barriers | instructions a tile |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.case, kernel.kernel), []).append(kernel)
    for (case, name), group in groups.items():
        found = {kernel.arch: kernel.columns for kernel in group}
        numbers = zip(*(found.get(arch, ["–"] * len(group[0].columns)) for arch in ARCHS), strict=True)
        cells = [f"`{case}`", f"`{name}`", group[0].work_formula, *(" / ".join(map(str, n)) for n in numbers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def section(text: str, begin: str = BEGIN) -> str:
    """What stands in a page between a mark and the next end."""
    return text.split(begin)[1].split(END)[0].strip()


def read_before_the_wait(kernel: Any) -> list[str]:
    """The arguments through which a kernel that waits for the one before it reads memory before it does.

    From each address back through the registers; up to the wait the code is a straight line.
    """
    if not kernel.metadata.launch_pdl:
        return []
    kinds = [(name, kind) for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    pointers = {str(number): {name} for number, (name, kind) in enumerate(kinds) if kind.startswith("*")}
    behind: dict[str, set[str]] = {}  # the pointers that a register was computed from
    found: set[str] = set()
    for line in kernel.asm["ptx"].split("griddepcontrol.wait")[0].splitlines():
        if load := re.search(r"\bld\.global\S*\s+(.*), \[ ?(%rd\d+)", line):
            found |= behind[load[2]]
            behind |= {register: set() for register in re.findall(r"%[a-z]+\d+", load[1])}
        elif write := re.match(r"\s+(?:@!?%p\d+ )?\w[\w.]*\s+(%[a-z]+\d+|\{.*?\}), (.*);", line):
            origins = [pointers.get(number, set()) for number in re.findall(r"_param_(\d+)", write[2])]
            origins += [behind[register] for register in re.findall(r"%[a-z]+\d+", write[2])]
            behind |= dict.fromkeys(re.findall(r"%[a-z]+\d+", write[1]), set().union(*origins))
    return sorted(found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description="Compile for sm_80, 89 and 90.")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--json", action="store_true", help="print the numbers and the table as JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it and run again")
    import triton

    compiled = [kernel for _, kernel in compile_cases(OFFLINE)]
    text = table(compiled, triton.__version__)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page.replace(section(page), text), encoding="utf-8")
    if options.json:
        print(json.dumps({"kernels": [kernel._asdict() for kernel in compiled], "table": text}))
    else:
        print(text)


if __name__ == "__main__":
    with ends_when_unread():
        main()
