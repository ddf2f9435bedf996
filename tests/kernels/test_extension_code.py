"""The machine code of the extension's CUDA part: no spills, wide accesses, no two roundings in one."""

import re
import subprocess
from collections import Counter

import pytest

from benchmarks._machine_code import INSTRUCTION, output_of
from kvlock_kernels import _extension

pytestmark = pytest.mark.skipif(
    _extension.path() is None or not _extension.architectures(),
    reason=f"the CUDA part of the extension is not built: {_extension.BUILD}, where there is nvcc",
)
Kernels = dict[tuple[str, str], Counter[str]]  # how often a kernel has each opcode, by architecture and mangled name


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """All kernels, read by the tools that Triton brings."""
    tools, found = pytest.importorskip("triton").knobs.nvidia, {}
    folder = tmp_path_factory.mktemp("cubins")
    extract = [tools.cuobjdump.path, "-xelf", "all", str(_extension.path())]
    subprocess.run(extract, cwd=folder, check=True, capture_output=True)
    for cubin in folder.glob("*.cubin"):
        arch = re.search(r"sm_\d+", cubin.name)
        assert arch is not None
        for part in re.split(r"\n(?=\.text\.)", output_of(tools.nvdisasm.path, "-c", str(cubin)))[1:]:
            found[arch[0], part.split(":", 1)[0]] = Counter(opcode for _, _, opcode, _ in INSTRUCTION.findall(part))
    return found


def count(opcodes: Counter[str], name: str, word: str = "") -> int:
    """How many instructions `name` there are, such as LDG, or of those that have the word, as in LDG.E.128."""
    parts = ((opcode.split("."), n) for opcode, n in opcodes.items())
    return sum(n for words, n in parts if words[0] == name and (not word or word in words))


def chosen(code: Kernels, *parts: str) -> Kernels:
    """The kernels whose mangled names hold all `parts`."""
    kernels = {key: opcodes for key, opcodes in code.items() if all(part in key[1] for part in parts)}
    assert kernels
    return kernels


def built_for() -> set[str]:
    return {"sm_" + re.sub(r"[^\d]", "", word) for word in _extension.architectures()}


def test_every_kernel_is_there_for_every_architecture(code: Kernels) -> None:
    assert {arch for arch, _ in code} == built_for()
    for arch in built_for():
        mixers, encoders = (sum(name in key[1] and key[0] == arch for key in code) for name in ("mix_k", "encode_"))
        assert mixers == 2 * 3 * 5 + 3 * 2  # wide or not, to 3 dtypes from 5; and in pairs of lanes from codes
        assert encoders == (4 * 2 + 1) * 3 * 2  # 4 numbers of lanes, in pairs or not, or any row, from 3 dtypes to 2


def test_nothing_spills(code: Kernels) -> None:
    assert not [key for key, opcodes in code.items() if count(opcodes, "LDL") + count(opcodes, "STL")]


@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half", "f"], ids=["bf16", "fp16", "fp32"])
def test_rows_move_in_accesses_of_16_bytes(code: Kernels, dtype: str) -> None:
    """4 rows a thread, and the mean by two more."""
    rows = 8 if dtype == "f" else 4
    for opcodes in chosen(code, f"encode_kernelI{dtype}").values():
        assert count(opcodes, "LDG", "128") == rows + 2
    for opcodes in chosen(code, f"mix_kernelI{dtype}", "Lb1").values():
        assert count(opcodes, "LDG", "128") >= rows
        assert count(opcodes, "STG", "128") >= rows


@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half", "f"], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("codes", ["int8", "e4m3"])
def test_codes_move_in_accesses_of_16_bytes_where_these_are_aligned(code: Kernels, codes: str, dtype: str) -> None:
    """Those of every other row, in a pair of lanes; elsewhere 8 bytes of each of 4 rows."""
    rows = 8 if dtype == "f" else 4
    for pairs in (True, False):
        for opcodes in chosen(code, f"encode_kernelI{dtype}", codes, f"Lb{pairs:d}").values():
            assert count(opcodes, "STG", "128") == (2 if pairs else 0)
            assert count(opcodes, "STG", "64") == (0 if pairs else 4)
        for opcodes in chosen(code, f"mix_kernelI{dtype}", codes, f"Lb1ELb{pairs:d}").values():
            assert count(opcodes, "LDG", "128") == rows + 2 + (2 if pairs else 0)
            assert count(opcodes, "LDG", "64") == (0 if pairs else 4)


def test_e4m3_is_encoded_by_an_instruction_where_there_is_one(code: Kernels) -> None:
    with_one = {key: opcodes for key, opcodes in chosen(code, "encode_", "e4m3").items() if int(key[0][3:]) >= 89}
    if not with_one:
        pytest.skip("the extension is built for older architectures only")
    for opcodes in with_one.values():
        assert any(opcode.startswith("F2FP") and "E4M3" in opcode for opcode in opcodes)


def test_no_product_and_sum_are_fused(code: Kernels) -> None:
    """A division, which encoding has, is made of them; its one sum beside is a difference from the mean."""
    assert not [key for key, opcodes in chosen(code, "mix_kernel").items() if count(opcodes, "FFMA")]
