"""What the runner of the benchmarks has, lists and chooses from."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks._case import SHAPES

README = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text(encoding="utf-8")
SOURCES = ("bf16", "e4m3", "int8")


def test_the_grid_has_the_models_and_all_shares_sources_and_ratios() -> None:
    tokens = {shape.name: (shape.tokens, shape.heads, shape.dim) for shape in SHAPES}
    assert tokens["wan-1.3b-480p"] == (32760, 12, 128) and tokens["wan-14b-480p"] == (32760, 40, 128)
    assert tokens["wan-14b-720p"] == (75600, 40, 128) and tokens["wan-5b-480p"] == (8190, 24, 128)
    assert {"cogvideox-2b", "ltx"} <= set(tokens)
    for op in ("kv_lerp_", "kv_lerp_attention_"):
        settings = {(case.source, case.setting) for case in runner.CASES if case.op == op}
        shares = {(source, f"share {share}, ratio 0.3") for source in SOURCES for share in ("0.25", "0.5", "0.8", "1")}
        assert settings == shares | {(source, f"share 0.8, ratio {ratio}") for source in SOURCES for ratio in "01"}


def test_the_core_is_small_and_serves_every_target() -> None:
    core = [case for case in runner.CASES if case.core]
    assert all(set(case.core) <= {provider.name for provider in case.providers} for case in core)
    assert sum(len(case.short().providers) for case in core) <= 45
    assert {case.op for case in core} >= set(re.findall(r"^\| `(\w+)` \| at ", README, flags=re.MULTILINE))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_ends_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert runner.main(["--gpu", "--core", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "needs a CUDA GPU" in err
    assert list(tmp_path.iterdir()) == []


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "windowed_variance_"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.startswith("windowed_variance_-fp32 ") for line in lines)


def test_providers_can_be_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--only", "pack_kv-H12-int8 wan-1.3b-480p share 0.8", "--by", "eager"]) == 0
    assert [line.split("; ")[1] for line in capsys.readouterr().out.splitlines()] == ["eager", "eager"]
    with pytest.raises(SystemExit):
        runner.main(["--by", "nobody"])
    assert "no provider of these cases has 'nobody'" in capsys.readouterr().err


def test_the_core_has_the_marked_providers_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--core", "--only", "guided_velocity"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("; ")[1] == "kvlock*, torch.compile*"


def test_a_name_that_no_case_has_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--only", "nonsense"])
    assert "no case has 'nonsense'" in capsys.readouterr().err
