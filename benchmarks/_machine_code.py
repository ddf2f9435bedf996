"""The machine code of kernels that Triton compiled: all of one architecture in one run of NVIDIA's disassembler."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+)?)\s*([A-Z][A-Z0-9_.]*)(.*)")


class Instruction(NamedTuple):
    """One instruction."""

    at: int  # the byte of the file that it begins at, by which branches name it
    guard: str  # the predicate that it is skipped without, or nothing
    opcode: str
    operands: str

    @property
    def target(self) -> int:
        """Where a branch goes, -1 for other instructions."""
        found = re.search("0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else -1

    @property
    def ends(self) -> bool:
        """Whether what follows in memory is never what follows in time."""
        always = self.opcode == "EXIT" or re.fullmatch(r"BRA\s+0x[0-9a-f]+ ;\s*", self.opcode + self.operands)
        return not self.guard and bool(always)


def disassembled(kernels: Sequence[Any]) -> list[list[Instruction]]:
    """The instructions of each compiled kernel.

    The disassembler takes longer to start than to read them all, so that it gets those of an architecture in one file.
    """
    from triton import knobs

    found: dict[int, list[Instruction]] = {}
    for arch in {kernel.metadata.target.arch for kernel in kernels}:
        group = [(i, code_of(kernel)) for i, kernel in enumerate(kernels) if kernel.metadata.target.arch == arch]
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(b"".join(code for _, code in group))
            file.flush()
            name = "SM90a" if arch == 90 else f"SM{arch}"
            lines = INSTRUCTION.findall(output_of(knobs.nvidia.nvdisasm.path, "--binary", name, file.name))
        instructions = [Instruction(int(at, 16), *words) for at, *words in lines]
        begin = 0
        for i, code in group:
            end = begin + len(code)
            found[i] = [one for one in instructions if begin <= one.at < end]
            begin = end
    return [found[i] for i in range(len(kernels))]


def code_of(kernel: Any) -> bytes:
    """The section of the cubin, an ELF file of 64 bits, that has the instructions of its only kernel."""
    cubin = kernel.asm["cubin"]
    ((table,), (size, count, names)) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    # Of each section its name, type, flags, address, offset and size.
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    name_of = sections[names][4]
    (code,) = (cubin[at : at + n] for name, *_, at, n in sections if cubin.startswith(b".text.", name_of + name))
    return code


def product_loop(code: Sequence[Instruction]) -> str:
    """The number of instructions in the smallest loop of a kernel that has products in it; or a dash."""
    number_of = {one.at: number for number, one in enumerate(code)}
    loops = []
    for last, one in enumerate(code):
        span = code[number_of[one.target] : last + 1] if one.target in number_of else []
        if any(re.match("HG?MMA", other.opcode) for other in span) and is_loop(span):
            loops.append(len(span))
    return str(min(loops)) if loops else "–"


def is_loop(span: Sequence[Instruction]) -> bool:
    """Whether the last instruction, which branches to the first, can be reached from there without leaving the span.

    A wait that stands out of line, behind the rest of the kernel, jumps back too, but only from outside is it reached.
    """
    number_of = {one.at: number for number, one in enumerate(span)}
    reached, ahead = set[int](), [0]
    while ahead:
        number = ahead.pop()
        if number in reached or number == len(span):
            continue
        reached.add(number)
        if not span[number].ends:
            ahead.append(number + 1)
        if span[number].target in number_of:
            ahead.append(number_of[span[number].target])
    return len(span) - 1 in reached


def output_of(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
