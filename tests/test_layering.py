"""Who may import whom: the imports of every file are read, also those inside functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import kvlock_kernels

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("kvlock", "kvlock_kernels") for path in (ROOT / package).rglob("*.py"))
HUB = {"diffusers", "transformers", "accelerate", "tokenizers"}  # the host and what comes with it
KERNELS = ("kvlock_kernels/_triton/", "kvlock_kernels/_cuda.py")  # where Triton is known
DISPATCHER = {"AttentionBackendName", "_AttentionBackendRegistry"}  # private to diffusers: one file to repair


class Import(NamedTuple):
    module: str  # absolute
    name: str | None  # after "import" in "from module import name"
    line: int

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import of a file, relative ones resolved; `importlib.import_module("x")` and `__import__("x")` count."""
    package = Path(file).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.Call) and node.args and _called(node).endswith(("import_module", "__import__")):
            argument = node.args[0]
            known = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            yield Import(argument.value if known else "<computed>", None, node.lineno)


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def violations(source: str, file: str) -> list[str]:
    """The rules a file breaks, `file` relative to the root of the repository."""
    found = []
    for used in imports(source, file):
        reason = _broken(used, file)
        if reason:
            found.append(f"{file}:{used.line}: {used.module}{f' ({used.name})' if used.name else ''}: {reason}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _called(node) in ("torch.load", "torch.save"):
            found.append(f"{file}:{node.lineno}: {_called(node)} unpickles or pickles")
        for name in DISPATCHER & _named(node):
            if file.startswith("kvlock/") and file != "kvlock/adapters/backend_registry.py":
                found.append(f"{file}:{node.lineno}: {name}: the dispatcher is touched in backend_registry only")
    return found


def _named(node: ast.AST) -> set[object]:
    """What a node of the tree names: a variable, an attribute, what is imported, or the text of a string."""
    return {getattr(node, field, None) for field in ("id", "attr", "name", "value")}


def _broken(used: Import, file: str) -> str | None:
    whole = used.module if used.name is None else f"{used.module}.{used.name}"
    if used.top in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
        return "no module reads or writes pickles"
    if whole.startswith(("torch.load", "torch.save", "torch.serialization")):
        return "no module reads or writes pickles"
    if used.module == "<computed>":
        return "an import by a computed name cannot be checked"
    if file == "kvlock_kernels/reference.py" and used.top not in {"torch", "__future__"} | sys.stdlib_module_names:
        return "the reference imports torch only"
    if file.startswith("kvlock_kernels/_triton") and whole.startswith("kvlock_kernels."):
        inner = whole.split(".")[1]
        if inner in ("reference", "api", "_ops") or not inner.startswith("_"):
            return "a kernel imports neither the reference nor what wraps it"
    of_kernels = used.top == "triton" or f"{whole}.".startswith("kvlock_kernels._triton.")
    if of_kernels and file.startswith("kvlock_kernels/") and not file.startswith(KERNELS):
        return "triton and its kernels are imported by the kernels and by what registers them on CUDA only"
    if file.startswith("kvlock_kernels/") and used.top in HUB | {"kvlock"}:
        return "the operators know neither the method nor its host"
    if file.startswith("kvlock/"):
        if used.top == "triton":
            return "the method uses operators, not triton"
        if used.top == "kvlock_kernels" and (
            used.module != "kvlock_kernels" or used.name is None or used.name not in kvlock_kernels.__all__
        ):
            return "the method uses public operators only: from kvlock_kernels import <name in __all__>"
        if used.top in HUB and not file.startswith(
            ("kvlock/adapters/", "kvlock/pipeline.py", "kvlock/cli/", "kvlock/mini/")
        ):
            return "the host is imported in adapters, pipeline, cli and mini only"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path):
    assert violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


BREAKS = {
    "reference-numpy": ("kvlock_kernels/reference.py", "import numpy as np"),
    "reference-lazily": ("kvlock_kernels/reference.py", "def f():\n    from diffusers import WanPipeline"),
    "reference-relative": ("kvlock_kernels/reference.py", "from . import api"),
    "triton-reference": ("kvlock_kernels/_triton/lerp.py", "from kvlock_kernels.reference import lerp"),
    "triton-reference-module": ("kvlock_kernels/_triton/lerp.py", "from kvlock_kernels import reference"),
    "triton-relative": ("kvlock_kernels/_triton/lerp.py", "from ..api import kv_lerp_"),
    "triton-ops": ("kvlock_kernels/_triton/lerp.py", "import kvlock_kernels._ops"),
    "triton-public-face": ("kvlock_kernels/_triton/lerp.py", "from kvlock_kernels import kv_lerp_"),
    "kernels-triton": ("kvlock_kernels/api.py", "import triton.language as tl"),
    "kernels-triton-lazily": ("kvlock_kernels/_ops.py", "def f():\n    from triton import jit"),
    "kernels-kernel": ("kvlock_kernels/attention.py", "from kvlock_kernels._triton.attend import kv_lerp_attention"),
    "kernels-kernel-module": ("kvlock_kernels/info.py", "from kvlock_kernels import _triton"),
    "kernels-kernel-whole": ("kvlock_kernels/_extension.py", "import kvlock_kernels._triton"),
    "kernels-kernel-relative": ("kvlock_kernels/_ops.py", "from ._triton import lerp"),
    "kernels-kernel-by-name": ("kvlock_kernels/_checks.py", "__import__('kvlock_kernels._triton.lerp')"),
    "kernels-method": ("kvlock_kernels/api.py", "from kvlock import KVLockConfig"),
    "kernels-host": ("kvlock_kernels/_ops.py", "import diffusers.hooks"),
    "kernels-by-name": ("kvlock_kernels/_ops.py", "import importlib\nimportlib.import_module('kvlock.run')"),
    "kernels-by-computed-name": ("kvlock_kernels/_ops.py", "import importlib\nimportlib.import_module(name)"),
    "method-private-operators": ("kvlock/run.py", "from kvlock_kernels.reference import lerp"),
    "method-operators-submodule": ("kvlock/run.py", "from kvlock_kernels import api"),
    "method-operators-whole": ("kvlock/run.py", "import kvlock_kernels"),
    "method-triton": ("kvlock/adapters/taps.py", "def f():\n    import triton.language as tl"),
    "method-host": ("kvlock/session.py", "from diffusers import WanPipeline"),
    "method-host-lazily": ("kvlock/masks.py", "def f():\n    import transformers"),
    "method-host-beside-the-command-line": ("kvlock/client.py", "import diffusers"),
    "method-accelerate": ("kvlock/run.py", "import accelerate.hooks"),
    "dispatcher": ("kvlock/adapters/taps.py", "from diffusers.models.attention_dispatch import AttentionBackendName"),
    "dispatcher-attribute": ("kvlock/pipeline.py", "backend = dispatch._AttentionBackendRegistry._active_backend"),
    "dispatcher-by-text": ("kvlock/adapters/fused.py", "names = getattr(dispatch, 'AttentionBackendName')"),
    "pickle": ("kvlock/mini/train.py", "import pickle"),
    "pickle-from": ("kvlock_kernels/api.py", "from pickle import loads"),
    "torch-load": ("kvlock/mini/checkpoint.py", "import torch\nx = torch.load('x')"),
    "torch-save": ("kvlock/pipeline.py", "import torch\ndef f(x):\n    torch.save(x, 'x')"),
    "torch-load-by-name": ("kvlock/pipeline.py", "from torch import load"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_found(name):
    file, source = BREAKS[name]
    assert len(violations(source, file)) == 1


ALLOWED = {
    "reference": ("kvlock_kernels/reference.py", "from math import prod\nimport torch\nfrom torch import Tensor"),
    "triton": ("kvlock_kernels/_triton/lerp.py", "import triton\nfrom kvlock_kernels._triton.tiles import load_lerp"),
    "registration": ("kvlock_kernels/_cuda.py", "import triton\nfrom kvlock_kernels._triton import lerp"),
    "dispatcher": ("kvlock/adapters/backend_registry.py", "names = attention_dispatch.AttentionBackendName"),
    "operators": ("kvlock_kernels/api.py", "from kvlock_kernels._ops import ops\nfrom . import _checks"),
    "method": ("kvlock/run.py", "from kvlock_kernels import kv_lerp_\nfrom kvlock.masks import Masks"),
    "adapters": ("kvlock/adapters/vae.py", "from diffusers.video_processor import VideoProcessor"),
    "command-line": ("kvlock/cli/models.py", "import diffusers"),
    "own-load": ("kvlock/mini/checkpoint.py", "from safetensors.torch import load_file\nx = load_file('x')"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_a_layer_may_import_what_belongs_to_it(name):
    file, source = ALLOWED[name]
    assert violations(source, file) == []
