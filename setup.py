"""Installation of the packages kvlock and kvlock_kernels."""

from pathlib import Path

from setuptools import find_packages, setup

TRITON = 'triton>=3.6; platform_system == "Linux"'  # CUDA builds of torch bring it, CPU builds do not

setup(
    name="kvlock",
    version="0.1.0",
    description="KV-Lock: training-free video editing that locks the background's attention keys and values",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["kvlock", "kvlock.*", "kvlock_kernels", "kvlock_kernels.*"]),
    package_data={
        "kvlock": ["py.typed"],
        "kvlock.mini": ["weights/*", "weights/*/*"],
        "kvlock_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.10",
        "diffusers>=0.38",
        "transformers",
        "accelerate",
        "ftfy",
        "safetensors",
        "imageio[ffmpeg]",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "ruff", "mypy", TRITON],
        "bench": ["pytest-benchmark", "nvidia-ml-py"],
        "flash": ["flash-attn"],
        "triton": [TRITON],
    },
    entry_points={"console_scripts": ["kvlock = kvlock.cli:main"]},
)
