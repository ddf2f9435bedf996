"""Tests of what the command line refuses in one line, and that a failure leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kvlock import video
from kvlock.cli import outputs, runs

pytest_plugins = ["command_line"]

BAD_EDITS = {
    "no video": ([], "no video; wanted --video"),
    "no mask": (["--video", "V"], "no mask; wanted --mask"),
    "no prompt": (["--video", "V", "--mask", "M"], "no prompt; wanted --prompt"),
    "missing video": (["--video", "gone.mp4", "--mask", "M"], "gone.mp4 does not exist"),
    "missing mask": (["--video", "V", "--mask", "gone.mp4"], "gone.mp4 does not exist"),
    "unreadable video": (["--video", "TEXT", "--mask", "M"], "as a video"),
    "mask of another size": (["--video", "V", "--mask", "SMALL"], "is 48x48 pixels"),
    "mask of another length": (["--video", "V", "--mask", "SHORT"], "has 1 frames; the video has 5"),
    "empty mask": (["--video", "V", "--mask", "BLACK", "--prompt", "a"], "nothing to edit"),
    "full mask": (["--video", "V", "--mask-box", "0,0,96,96", "--prompt", "a"], "nothing to lock"),
    "box outside": (["--video", "V", "--mask-box", "0,0,97,96"], "leaves the picture"),
    "mask and box": (["--video", "V", "--mask", "M", "--mask-box", "0,0,8,8"], "not allowed with"),
    "example and video": (["--example", "--video", "V"], "leave out --video"),
    "negative example": (["--example", "-1"], "-1"),
    "odd picture": (["--video", "SMALLVIDEO", "--mask-box", "0,0,8,8", "--prompt", "a"], "video height is 40; wanted"),
    "unknown preset": (["--example", "--preset", "nonsense"], "unknown preset 'nonsense'; known presets: kv-lock"),
    "unknown model": (["--example", "--model", "/gone/model"], "model /gone/model does not exist"),
    "no pipeline": (["--example", "--model", "EMPTY"], "no transformer/config.json"),
    "no configuration": (["--example", "--model", "BROKEN"], "is not the configuration of a diffusers model"),
    "unsupported transformer": (["--example", "--model", "FLUX"], "FluxTransformer2DModel is not supported"),
    "weights that do not load": (["--example", "--model", "WEIGHTLESS"], "cannot load model"),
    "unknown device": (["--example", "--device", "abacus"], "device 'abacus' is not available"),
    "no steps": (["--example", "--steps", "0"], "--steps 0 is out of range"),
    "too many steps": (["--example", "--steps", "1000000000000"], "--steps 1000000000000 is out of range; wanted 1 to"),
    "empty video": (["--video", "", "--mask", "M", "--prompt", "a"], "argument --video: an empty path"),
    "empty mask path": (["--video", "V", "--mask", "", "--prompt", "a"], "argument --mask: an empty path"),
    "empty reference": (["--example", "--reference", ""], "argument --reference: an empty path"),
    "empty model": (["--example", "--model", ""], "argument --model: an empty path"),
    "no number": (["--example", "--steps", "few"], "invalid int value"),
    "endless guidance": (["--example", "--guidance-scale", "inf"], "wanted a finite number"),
    "negative guidance outside": (["--example", "--background-guidance", "-1"], "--background-guidance -1.0 is"),
    "tau without variance": (["--example", "--preset", "full-lock", "--tau", "0.5"], "--tau 0.5 has no effect"),
    "unknown option": (["--example", "--nonsense"], "unrecognized arguments: --nonsense"),
    "output that is no video": (["--example", "--out", "out.txt"], "wanted a name that ends in .mp4"),
    "output in place of the trace": (["--example", "--out", "side-by-side.mp4"], "the name of another result"),
    "output under a file": (["--example", "--out", "UNDER"], "is a file"),
    "output over the input": (["--video", "V", "--mask", "M", "--prompt", "a", "--out", "V"], "would be overwritten"),
    "output in a folder of input pictures": (
        ["--video", "V", "--mask", "FRAMES", "--prompt", "a", "--out", "BESIDE"],
        "is an input folder, which must not change",
    ),
    "output with a name too long": (["--example", "--out", "x" * 300 + ".mp4"], "File name too long"),
    "output in a folder with a name too long": (["--example", "--out", "x" * 300 + "/a.mp4"], "File name too long"),
    "unsupported pipeline": (["--example", "--model", "IMAGE"], "pipeline WanImageToVideoPipeline is not supported"),
    "guidance beyond float32": (["--example", "--guidance-scale", "1e39"], "--guidance-scale 1e+39 is out of range"),
    "guidance outside beyond float32": (
        ["--example", "--background-guidance", "1e39"],
        "--background-guidance 1e+39 is out of range",
    ),
    "seed beyond 64 bits": (["--example", "--seed", str(2**63)], "--seed 9223372036854775808 is out of range"),
    "example beyond 64 bits": (["--example", str(2**63 - 1)], "argument --example: '9223372036854775807' is not"),
    "device without its module": (["--example", "--device", "hpu"], "device 'hpu' is not available"),
    "device without values": (["--example", "--device", "meta"], "device 'meta' holds no values"),
    "huge video": (["--video", "HUGE", "--mask", "M"], "Image size (400000000 pixels) exceeds limit"),
    "huge mask": (["--video", "V", "--mask", "HUGE"], "Image size (400000000 pixels) exceeds limit"),
    "huge reference": (["--example", "--reference", "HUGE"], "Image size (400000000 pixels) exceeds limit"),
    "mask in the alpha channel": (["--video", "V", "--mask", "SHAPE"], "is transparent in parts"),
    "missing reference": (["--example", "--reference", "gone.png"], "cannot read gone.png as a picture"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory, model):
    """Files that are wrong, by the names they have in BAD_EDITS."""
    folder = tmp_path_factory.mktemp("bad")
    names = {name: str(folder / f"{name}.mp4") for name in ("V", "M", "SMALL", "SHORT", "BLACK", "SMALLVIDEO", "TEXT")}
    white = torch.zeros(5, 96, 96, 3)
    white[:, 40:56, 40:56] = 1
    for name, frames in {
        "V": white / 2,
        "M": white,
        "SMALL": white[:, :48, :48],
        "SHORT": white[:1],
        "BLACK": white * 0,
        "SMALLVIDEO": white[:, :40],
    }.items():
        video.write_video(names[name], frames, 8)
    Path(names["TEXT"]).write_text("not a video")
    names["UNDER"] = names["TEXT"] + "/out.mp4"
    Image.new("RGBA", (96, 96), (255, 255, 255, 0)).save(folder / "SHAPE.png")
    Image.new("1", (20000, 20000)).save(folder / "HUGE.png")
    (folder / "FRAMES").mkdir()
    for number in range(5):
        Image.new("L", (96, 96), 40 * number).save(folder / f"FRAMES/{number}.png")
    names |= {"SHAPE": str(folder / "SHAPE.png"), "HUGE": str(folder / "HUGE.png"), "FRAMES": str(folder / "FRAMES")}
    names["BESIDE"] = names["FRAMES"] + "/out.mp4"
    for name in ("EMPTY", "BROKEN", "FLUX", "WEIGHTLESS", "IMAGE"):
        names[name] = str(folder / name)
        for part in ("transformer", "vae"):
            (folder / name / part).mkdir(parents=True)
            config = (Path(model) / part / "config.json").read_text()
            if name != "EMPTY":
                (folder / name / part / "config.json").write_text("{" if name == "BROKEN" else config)
        pipeline = {"_class_name": "WanImageToVideoPipeline" if name == "IMAGE" else "WanVACEPipeline"}
        (folder / name / "model_index.json").write_text(json.dumps(pipeline))
    flux = {"_class_name": "FluxTransformer2DModel"}
    (folder / "FLUX/transformer/config.json").write_text(json.dumps(flux))
    return names


@pytest.mark.parametrize("case", BAD_EDITS)
def test_bad_input_ends_with_one_line_and_leaves_nothing(kvlock, here, model, bad_inputs, no_denoising, case):
    argv, message = BAD_EDITS[case]
    argv = [bad_inputs.get(a, a) for a in argv]
    if "--model" not in argv:
        argv += ["--model", model]
    before = {path: Path(path).read_bytes() for name, path in bad_inputs.items() if Path(path).is_file()}
    code, out, err = kvlock("edit", *argv)
    errors = [line for line in err if line.startswith("kvlock: error: ")]
    assert code == 2
    assert len(errors) == 1 and message in errors[0]
    assert not any("Traceback" in line or line.startswith("usage") for line in err)
    assert out == [] and not no_denoising
    assert list(here.iterdir()) == []
    assert all(Path(path).read_bytes() == data for path, data in before.items())


def test_references_need_a_vace_model(kvlock, here, model, clip, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "ref.png")
    path = tmp_path / "t2v"
    path.mkdir()
    (path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    for part in ("transformer", "vae"):
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text((Path(model) / part / "config.json").read_text())
    (path / "transformer/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    code, _, err = kvlock("edit", "--example", "--reference", tmp_path / "ref.png", "--model", path)
    assert code == 2 and "--reference needs a VACE model" in err[-1]


def test_a_hub_model_that_cannot_be_fetched_is_one_line(kvlock, here, monkeypatch):
    def offline(*_):
        raise OSError("cannot reach the Hub\nmany\nmore lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    code, _, err = kvlock("estimate", "--example", "--model", "somebody/something")
    assert code == 2
    assert err == [
        "kvlock: error: model somebody/something is no folder, and the Hub does not give its model_index.json: "
        "cannot reach the Hub"
    ]


def test_a_full_disk_leaves_the_old_results(kvlock, here, model, no_denoising, monkeypatch, written):
    (here / "kvlock-out").mkdir()
    (here / "kvlock-out/out.mp4").write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvlock.plots.contact_sheet", full)
    code, _, err = kvlock("edit", "--example", "--model", model)
    assert code == 2 and "No space left" in err[-1]
    assert written(here) == ["kvlock-out/out.mp4"]
    assert (here / "kvlock-out/out.mp4").read_bytes() == b"old"


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


EXHAUSTED = [
    RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000000000 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", EXHAUSTED, ids=["cuda", "cpu", "cpu-windows", "python"])
def test_too_little_memory_is_one_line(kvlock, here, model, monkeypatch, error):
    monkeypatch.setattr(runs, "denoise", raising(error))
    code, _, err = kvlock("edit", "--example", "--model", model)
    assert code == 1 and err[-1].startswith("kvlock: error: out of memory; try --offload")


@pytest.mark.parametrize("error", EXHAUSTED, ids=["cuda", "cpu", "cpu-windows", "python"])
def test_a_model_too_large_for_the_memory_is_told_from_a_bad_one(kvlock, here, model, monkeypatch, error):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", raising(error))
    monkeypatch.setattr("diffusers.DiffusionPipeline.to", raising(error))
    code, _, err = kvlock("edit", "--example", "--model", model)
    assert code == 1 and err[-1].startswith("kvlock: error: out of memory; try --offload")


def test_the_real_message_of_a_full_memory_is_known(kvlock, here, model, monkeypatch):
    monkeypatch.setattr(runs, "denoise", lambda *_, **__: torch.empty(10**16))
    assert kvlock("edit", "--example", "--model", model)[0] == 1


def test_a_bug_is_no_exhausted_memory(kvlock, here, model, monkeypatch):
    monkeypatch.setattr(runs, "denoise", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        kvlock("edit", "--example", "--model", model)


def test_a_folder_that_takes_no_file_is_refused_before_the_work(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"cannot write .*out\.mp4: Read-only file system; choose another"):
        outputs.check(tmp_path / "new" / "out.mp4", (), [])


def test_a_failure_while_writing_names_the_folder_of_the_results(tmp_path):
    message = "cannot write the results to .*results: .*full"
    with pytest.raises(ValueError, match=message), outputs.staged(tmp_path / "results"):
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []
