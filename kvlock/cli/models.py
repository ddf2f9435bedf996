"""The model that the commands share: what its configuration says, and its weights."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kvlock.cost import ModelSizes
    from kvlock.geometry import Geometry

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # that a transformer may run in, and their bytes a value


class Model(NamedTuple):
    """What a model's configuration says, known before any weight is loaded."""

    name: str
    geometry: Geometry
    sizes: ModelSizes
    has_vace: bool
    frame_rate: float | None  # of a pipeline that is told of the video's: its default
    experts: int  # transformers that share a run's steps: 1 or 2
    strength: float  # the share of its steps that the pipeline runs, the last ones: 1, or less from video to video

    def first_step(self, num_steps: int) -> int:
        """Index at which the pipeline enters a table of `num_steps`; ValueError if no step is left."""
        from kvlock.job import first_step

        return first_step(num_steps, self.strength, f"--steps {num_steps}")


def describe(model: str | None) -> Model:
    """Read a model's configuration; None is the embedded miniature.

    Raises:
        ValueError: there is no such model, it is no diffusers pipeline, or pipeline or transformer is not supported or
            not made for the other.
    """
    import diffusers

    from kvlock.adapters.families import FAMILIES, PIPELINES, STARTS_FROM_VIDEO, check_pair
    from kvlock.cost import ModelSizes
    from kvlock.geometry import Geometry

    index = _read_json(_find(model, "model_index.json"))
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline {pipeline} is not supported; supported pipelines: {', '.join(PIPELINES)}")
    transformer, vae = (_read_config(model, part) for part in ("transformer", "vae"))
    name = transformer._class_name
    if name not in FAMILIES:
        raise ValueError(f"transformer {name} is not supported; supported transformers: {', '.join(FAMILIES)}")
    check_pair(pipeline, name)
    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    parts = SimpleNamespace(transformer=SimpleNamespace(config=transformer), vae=SimpleNamespace(config=vae))
    return Model(
        name=model or "embedded miniature",
        geometry=Geometry.of(parts),
        sizes=ModelSizes.of(transformer)._replace(joint_branches=FAMILIES[name].joint_branches),
        has_vace=getattr(transformer, "vace_layers", None) is not None,
        frame_rate=parameters["frame_rate"].default if "frame_rate" in parameters else None,
        experts=1 if index.get("transformer_2") in (None, [None, None]) else 2,  # [null, null] is a part left out
        # What it takes where it is told none, as it is here.
        strength=parameters["strength"].default if pipeline in STARTS_FROM_VIDEO else 1.0,
    )


def _read_config(model: str | None, part: str) -> SimpleNamespace:
    """A part's configuration, completed by the defaults of its class as loading it would."""
    import diffusers

    path = _find(model, f"{part}/config.json")
    config = _read_json(path)
    try:
        defaults = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters.values()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a diffusers model") from error
    known = {parameter.name: parameter.default for parameter in defaults if parameter.default is not parameter.empty}
    return SimpleNamespace(**(known | config))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a diffusers model") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a diffusers model")
    return config


def _find(model: str | None, file: str) -> Path:
    """A file of the model, fetched from the Hub where the model is no folder."""
    if model is None:
        from kvlock import mini

        folder = mini.PATH
    else:
        folder = Path(model)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise ValueError(f"model {folder} has no {file}; wanted the folder of a diffusers pipeline")
        return folder / file
    if model is None:
        raise ValueError(f"the embedded miniature is not installed: {folder} is missing; name another with --model")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"model {folder} does not exist; wanted the folder of a diffusers pipeline or a Hub id a/b")
    return _fetch(model, file)


def _fetch(model: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, file))
    except Exception as error:  # whatever the connection, the Hub or its cache objects to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model {model} is no folder, and the Hub does not give its {file}: {reason[0]}") from error


def load_pipeline(model: str | None, *, dtype: str, device: str, offload: str) -> Any:
    """Load the weights onto a device; the VAE stays in float32.

    Args:
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU, but float32 for the miniature.
        device: a torch device, or "auto": the GPU if there is one.
        offload: "none", "model" (one component on the device at a time) or "group" (one layer at a time).

    Raises:
        ValueError: the model cannot be loaded, or the device is not there.
    """
    import torch

    from kvlock.memory import is_out_of_memory

    target = resolve_device(device)
    precision = getattr(torch, resolve_dtype(dtype, model, target.type))
    try:
        pipe = _from_pretrained(model, precision)
        _check_complete(pipe)
        _place(pipe, target, offload)
    except Exception as error:  # missing files, parts of other libraries, the connection: all are one bad model
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"cannot load model {model or 'embedded miniature'}: {reason[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _from_pretrained(model: str | None, precision: Any) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from kvlock import mini

    if model is None and precision is torch.float32:
        return mini.load()
    with warnings.catch_warnings():
        # Newer versions call it dtype and say so; the older name works in all that are supported.
        warnings.simplefilter("ignore", FutureWarning)
        # Loading in another precision keeps the layers that need float32 in it, which a later cast would not.
        return DiffusionPipeline.from_pretrained(
            str(mini.PATH) if model is None else model,
            torch_dtype={"default": precision, "vae": torch.float32},
            use_safetensors=True,  # the other format is a pickle, which runs what it holds
        )


def _check_complete(pipe: Any) -> None:
    """Refuse a model that has fewer weights than its configuration says, which loading leaves without values."""
    from torch import nn

    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            for name, weight in module.named_parameters():
                if weight.is_meta:
                    raise ValueError(f"its {part} has no weights for {name}")


def _place(pipe: Any, target: Any, offload: str) -> None:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=target)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=target, offload_type="leaf_level", use_stream=target.type == "cuda")
    else:
        pipe.to(target)


def resolve_device(device: str) -> Any:
    """The torch device of this name.

    Raises:
        ValueError: torch knows no such device, or there is none.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except Exception as error:  # every kind of device that is missing raises another kind of error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"device {device!r} is not available: {reason[0]}") from error
    if target.type == "meta":
        raise ValueError("device 'meta' holds no values; wanted one that computes, such as cpu or cuda")
    return target


def resolve_dtype(dtype: str, model: str | None, device_type: str) -> str:
    """The name of the torch dtype the transformer runs in."""
    if dtype != "auto":
        return dtype
    return "float32" if model is None or device_type == "cpu" else "bfloat16"
