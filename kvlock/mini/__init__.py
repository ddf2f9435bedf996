"""The embedded miniature: a small trained Wan2.1-VACE pipeline and the one world it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("weights")


def load(path: str | Path = PATH) -> Any:
    """The miniature as a `WanVACEPipeline`, on the CPU in fp32, its strides repaired.

    Raises:
        ValueError: there is no pipeline at `path`, or one whose weights are no safetensors: nothing is unpickled.
    """
    from diffusers import WanVACEPipeline

    from kvlock.adapters.vae import repair_stride

    if not (Path(path) / "model_index.json").exists():
        raise ValueError(f"no pipeline at {path}: model_index.json is missing; wanted the folder of a saved pipeline")
    try:
        pipe = WanVACEPipeline.from_pretrained(path, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"cannot load the pipeline at {path}: {error}") from error
    repair_stride(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe
