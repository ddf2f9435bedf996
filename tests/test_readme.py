"""What the README shows can be run: its Python as it stands, its commands by the parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kvlock.cli import build_parser

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_one_after_the_other_as_they_stand(capsys):
    names: dict = {}
    printed = []
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert "torch.Size([17, 96, 96, 3])" in printed[0]
    assert names["edited"].shape == (1, 17, 96, 96, 3)
    assert all("'step': 49" in text for text in printed)


@pytest.mark.parametrize("line", [line for block in blocks("console") for line in block.splitlines()])
def test_a_command_that_needs_a_download_is_one_the_parser_takes(line):
    program, *arguments = shlex.split(line)
    assert program == "kvlock"
    build_parser().parse_args(arguments)


def test_local_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_the_shell_blocks_that_ci_runs_are_few():
    assert [len(block.splitlines()) for block in blocks("bash")] == [1, 2, 1]
