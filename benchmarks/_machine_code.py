"""The machine code of kernels that Triton compiled: all of one architecture in one run of NVIDIA's disassembler."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


class Instruction(NamedTuple):
    """One instruction."""

    at: int  # the byte of the file that it begins at, by which branches name it
    opcode: str
    operands: str


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
        instructions = [Instruction(int(at, 16), opcode, operands) for at, opcode, operands in lines]
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
    loops = []
    for number, one in enumerate(code, 1):
        target = re.search("0x([0-9a-f]+)", one.operands) if one.opcode.startswith("BRA") else None
        body = [other.opcode for other in code[:number] if target and other.at >= int(target[1], 16)]
        if any("HMMA" in opcode or "HGMMA" in opcode for opcode in body):
            loops.append(len(body))
    return str(min(loops)) if loops else "–"


def output_of(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
