"""What is read from machine code, on code written by hand."""

import pytest

from benchmarks._machine_code import Instruction, product_loop


def assembled(text: str) -> list[Instruction]:
    """A line is an instruction of sixteen bytes, with its label before and its predicate between colons."""
    rows = [[part.strip() for part in line.split(":")] for line in text.strip().splitlines()]
    labels = {label: f"0x{16 * number:x}" for number, (label, *_) in enumerate(rows) if label}
    code = []
    for number, (_, guard, instruction) in enumerate(rows):
        opcode, _, operands = instruction.partition(" ")
        code.append(Instruction(16 * number, guard, opcode, f" {labels.get(operands, operands)} ;"))
    return code


TWO_WAITS = """
        :     : MOV
tile    :     : SYNCS
        : !P1 : BRA late
ready   :     : HGMMA
        :     : MUFU
        :     : MUFU
        :     : MUFU
        :     : MUFU
        : P0  : BRA tile
        :     : SYNCS
        : !P1 : BRA last
values  :     : HGMMA
        :     : EXIT
late    :     : SYNCS
        : !P1 : BRA late
        :     : BRA ready
last    :     : SYNCS
        : !P1 : BRA last
        :     : BRA values
"""  # the loop is eight long; from the second wait, out of line, back to the products it waits for it is no loop


def test_a_wait_out_of_line_that_jumps_back_makes_no_loop() -> None:
    assert product_loop(assembled(TWO_WAITS)) == "8"
    without_the_loop = [one for one in assembled(TWO_WAITS) if one.at != 8 * 16]
    assert product_loop(without_the_loop) == "–"


def test_a_loop_may_have_branches_in_it() -> None:
    code = """
            :    : MOV
    tile    :    : HMMA
            : P1 : BRA masked
            :    : FADD
            :    : BRA next
    masked  :    : FSEL
    next    :    : HMMA
            : P0 : BRA tile
            :    : EXIT
    """
    assert product_loop(assembled(code)) == "7"


@pytest.mark.parametrize("opcode", ["HMMA.16816.F32.BF16", "FFMA"])
def test_code_without_such_a_loop_has_a_dash(opcode: str) -> None:
    loop = "tile : : FADD\n : P0 : BRA tile\n : : EXIT"
    assert product_loop(assembled(f" : : {opcode}\n{loop}")) == "–"
