"""The pictures of results: what they show is read back from the axes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_readme import H100, text
from PIL import Image

from benchmarks import __main__ as runner
from benchmarks import _edit_rows, _modes, figures, growth, roofline
from benchmarks._case import RATES
from benchmarks._harness import Results, Row, read
from benchmarks.lerp import is_usual
from benchmarks.report import H200

GPU = RATES["NVIDIA H100 80GB HBM3"]
EDITS = [edited.row for edited in _edit_rows.latest(_edit_rows.beside(H100))]


LOCK = "share 0.8, ratio 0.3"


@pytest.fixture(scope="module")
def lines() -> list[roofline.Line]:
    return roofline.latest(roofline.measured(H100))


def time(lines: list[roofline.Line], *key: str) -> float:
    return next(line.measured or 0 for line in lines if line[:5] == key)


def test_every_measured_row_of_the_headline_shape_is_a_bar(lines: list[roofline.Line]) -> None:
    (axes,) = figures.limit(lines, GPU, "H100").axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    rows = [line for line in lines if line.shape == "wan-1.3b-480p" and line.op != "lock_schedule"]  # all launch
    assert sorted(labels) == sorted(map(figures.label, rows)) and len(rows) > 40
    widths = {label: bar.get_width() for label, bar in zip(labels, axes.patches, strict=True)}
    lerp = time(lines, "kv_lerp_", "kvlock", "wan-1.3b-480p", "bf16", LOCK)
    assert widths[f"kv_lerp_ bf16 share 0.8 · kvlock, {lerp:.0f} us"] == pytest.approx(100 * 80.54 / lerp, abs=0.1)


def test_rows_of_varied_shares_and_ratios_are_no_bars() -> None:
    lines = roofline.latest(roofline.measured(H200))
    (axes,) = figures.limit(lines, roofline.rates(H200), "H200").axes
    names = [text.get_text().rsplit(",", 1)[0] for text in axes.get_yticklabels()]
    assert len({*names}) == len(names) > 40
    usual = [line for line in lines if line.shape == "wan-1.3b-480p" and is_usual(line.setting)]
    assert len(names) == len([line for line in usual if line.op != "lock_schedule"])
    varied = {line.setting for line in lines} - {line.setting for line in lines if is_usual(line.setting)}
    assert varied == {*(f"share {share}{ratio}" for share in (0.25, 0.5, 1) for ratio in ("", ", ratio 0.3")),
                      "share 0.8, ratio 0", "share 0.8, ratio 1"}  # fmt: skip


def test_attention_is_drawn_over_its_tokens(lines: list[roofline.Line]) -> None:
    (axes,) = figures.attention(lines, GPU, "H100").axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    assert drawn["SDPA cuDNN"].get_xdata().tolist() == [4096, 8192, 16384, 32760, 75600]
    locked = "kv_lerp_attention_", "kvlock", "int8", LOCK
    for name, (op, provider, source, setting) in {
        "SDPA cuDNN": ("attention", "SDPA cuDNN", "", "no rows"), "locked, rows in int8": locked,
    }.items():  # fmt: skip
        for at, shape in ((-2, "wan-1.3b-480p"), (-1, "wan-1.3b-720p")):
            tokens, us = drawn[name].get_xdata()[at], time(lines, op, provider, shape, source, setting)
            assert drawn[name].get_ydata()[at] == pytest.approx(4 * tokens**2 * 12 * 128 / us / 1e6, abs=0.01)
    assert set(drawn["assumed by predictions"].get_ydata()) == {650}


def test_growth_has_a_predicted_line_and_only_measured_points() -> None:
    measured_on = roofline.measured(H200)
    lines, edits = roofline.latest(measured_on), [edited.row for edited in _edit_rows.latest(_edit_rows.beside(H200))]
    tokens, share, kappa, memory, layers = growth.figure(measured_on, edits, roofline.rates(H200), "H200").axes
    points = lambda axes, name: [
        (x, y) for line in axes.get_lines() if line.get_label() == name for x, y in line.get_xydata()
    ]
    over = points(tokens, "measured, int8")
    assert sorted(x for x, _ in over) == [4096, 8192, 16384, 32760, 75600]  # those of 12 heads
    us = [time(lines, "kv_lerp_attention_", "kvlock", "wan-1.3b-720p", "int8", LOCK),
          time(lines, "attention", "kvlock sm_90", "wan-1.3b-720p", "", "no rows")]  # fmt: skip
    assert [y for x, y in over if x == 75600] == [pytest.approx(us[0] / us[1])]
    mixing = time(lines, "kv_lerp_pair_", "kvlock", "wan-1.3b-480p", "bf16", LOCK)
    assert points(share, "measured, bf16") == [(0.8, mixing)]
    assert points(memory, "measured, bf16") == [(30, 4.38), (15, 2.19)]
    ratios = {row.mode: float(row.edit_ratio) for row in edits if row.model == "wan-1.3b, random"}
    half = [(15, ratios["half the layers, hooks"])]
    for mode in ("store, hooks", "store, fused", "batch, hooks"):
        assert points(kappa, f"measured, {mode}") == [(0.4, ratios[mode])]
        assert points(layers, f"measured, {mode}") == [(30, ratios[mode]), *(half if mode == "store, hooks" else ())]
    measured = {x for axes in (share, memory, kappa, layers) for line in axes.get_lines() for x in line.get_xdata()
                if str(line.get_label()).startswith("measured")}  # fmt: skip
    assert measured == {0.8, 30, 15, 0.4}
    over_layers = dict(points(layers, "predicted, store, hooks"))
    text(f"takes {half[0][1]:.2f} times as long as the plain pipeline ({over_layers[15]:.2f} is predicted):")
    line = dict(points(kappa, "predicted, store, hooks"))
    assert line[0.4] == pytest.approx(1.204, abs=1e-3)
    assert line[0.2] == pytest.approx((1 + line[0.4]) / 2)
    assert line[1.0] == line[0.96] > line[0.94]  # the first two steps have no lock
    assert dict(points(memory, "predicted, rows in bf16"))[30] == pytest.approx(4.38, abs=0.001)
    assert over_layers[30] == line[0.4] and over_layers[15] == pytest.approx((1 + line[0.4]) / 2, abs=2e-4)
    assert over_layers[15] == pytest.approx(ratios["half the layers, hooks"], abs=0.005)
    beside = dict(points(layers, "predicted, batch, hooks"))
    assert 1.4 < beside[1] < beside[30]  # it runs every block, whatever locks


def test_lerps_are_drawn_at_the_shares_of_their_rows(lines: list[roofline.Line]) -> None:
    (one,) = [line for line in lines if line[:5] == ("kv_lerp_", "kvlock", "wan-1.3b-480p", "int8", LOCK)]
    more = {"share 0.25, ratio 0.3": 1.0, "share 1, ratio 0.3": 4.0}
    again = [one._replace(setting=setting, measured=us) for setting, us in more.items()]
    elsewhere = {"shape": "wan-14b-480p", "setting": "share 0.5, ratio 0.3"}
    others = [one._replace(setting="share 0.5, ratio 0", measured=9.0), one._replace(**elsewhere)]
    share = growth.figure([*lines, *again, *others], EDITS, GPU, "H100").axes[1]
    drawn = {line.get_label(): [*map(tuple, line.get_xydata().tolist())] for line in share.get_lines()}
    assert sorted(drawn["measured, int8"]) == [(0.25, 1.0), (0.8, one.measured), (1.0, 4.0)]
    assert drawn["measured, bf16"] == [(0.8, time(lines, "kv_lerp_", "kvlock", "wan-1.3b-480p", "bf16", LOCK))]
    assert share.get_ylabel() == "kv_lerp_, one layer (us)"
    case = roofline.BY_KEY["kv_lerp_", "wan-1.3b-480p", "int8", LOCK]
    predicted = dict(drawn["predicted, rows in int8"])[0.8]
    assert predicted == pytest.approx(case.work(case.shape).predicted_us(GPU), rel=1e-3)


def test_an_edit_with_half_the_layers_is_drawn_at_them(lines: list[roofline.Line]) -> None:
    usual = next(row for row in EDITS if row.mode == "store, hooks")
    half = usual._replace(mode=_modes.HALF, source_gib="2.19", edit_ratio="1.11")
    panels = growth.figure(lines, [*EDITS, half], GPU, "H100").axes
    for axes, label, expected in (
        (panels[3], "measured, bf16", [[15, 2.19], [30, 4.38]]),
        (panels[4], "measured, store, hooks", [[15, 1.11], [30, float(usual.edit_ratio)]]),
    ):
        (drawn,) = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_label() == label]
        assert sorted(drawn) == expected


def test_edits_of_another_model_are_no_points_of_this_one(lines: list[roofline.Line]) -> None:
    small = [row for row in EDITS if row.model == "wan-1.3b, random"]
    larger = [row._replace(model="wan-14b, random", background="1", tokens="2", edit_ratio="9") for row in small]
    pictures = [growth.figure(lines, rows, GPU, "H100").axes for rows in (small, [*larger, *small])]
    drawn = [[line.get_xydata().tolist() for axes in picture for line in axes.get_lines()] for picture in pictures]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("gpu", [pytest.param("NVIDIA H100 80GB HBM3", marks=pytest.mark.smoke), "NVIDIA GeForce"])
def test_pictures_are_written_beside_the_results_of_any_gpu(tmp_path: Path, gpu: str) -> None:
    path = tmp_path / "gpu.csv"
    with Results(path, Row._fields) as results:
        for row in (row for row in read(H100) if row.op in ("copy", "matmul", "kv_lerp_")):
            results.write(row._replace(gpu=gpu))
    drawn = figures.draw(path)
    assert [picture.name for picture in drawn] == ["gpu-limit.png", "gpu-attention.png", "gpu-growth.png"]
    for picture in drawn:
        with Image.open(picture) as image:
            assert image.info["Rows"] == figures.rows_of(path)


def test_no_picture_is_drawn_where_nothing_says_what_the_gpu_reaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.csv"
    with Results(path, Row._fields) as results:
        results.write(next(row for row in read(H100) if row.op == "copy")._replace(gpu="NVIDIA GeForce"))
    for file in (path, tmp_path / "gone.csv"):
        with pytest.raises(SystemExit):
            figures.main([str(file)])
    lacks, gone = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "gpu.csv: no rates are known of 'NVIDIA GeForce', and there is no row of matmul; wanted a run of" in lacks
    assert "gone.csv" in gone and [file.name for file in tmp_path.iterdir()] == ["gpu.csv"]


@pytest.mark.parametrize("path", roofline.micro_results(), ids=lambda path: path.stem)
def test_the_pictures_are_drawn_from_the_rows_beside_them(path: Path) -> None:
    pictures = sorted(path.parent.glob(f"{path.stem}-*.png"))
    assert len(pictures) == 3
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.info.get("Rows") == figures.rows_of(path), "python -m benchmarks.figures"


def test_a_row_more_of_operators_or_edits_makes_other_pictures(tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    path.write_bytes(H100.read_bytes())
    seen = [figures.rows_of(path)]
    for each in (path, _edit_rows.beside(path)):
        with each.open("a", encoding="utf-8") as file:
            file.write("a row\n")
        seen.append(figures.rows_of(path))
    assert len({*seen}) == 3


def test_a_run_on_a_gpu_writes_the_ceilings_and_the_rows_and_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, _, first, *_ = read(H100)
    monkeypatch.setattr(runner, "Machine", lambda commit: SimpleNamespace(file="nvidia-h100-pcie.csv"))
    monkeypatch.setattr(runner, "copy_row", lambda machine: (copy, 3e12))
    monkeypatch.setattr(runner, "matmul_row", lambda machine: (copy._replace(op="matmul"), 7e14))
    ceilings = []
    monkeypatch.setattr(runner, "rows", lambda cases, machine, given: ceilings.append(given) or [first])
    runner.measure([], tmp_path, None)
    assert [row.op for row in read(tmp_path / "nvidia-h100-pcie.csv")] == ["copy", "matmul", first.op]
    assert ceilings == [(3e12, 7e14)]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"nvidia-h100-pcie-{name}.png" for name in ("limit", "attention", "growth")
    }
