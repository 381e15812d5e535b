"""Packaging of Medley: the libraries ``pretrain`` and ``fused_objectives``, and the command ``medley``."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="medley-pretrain",
    version="0.1.0",
    description="Pre-training of language encoders on many objectives at once, on DeepSpeed",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["fused_objectives", *find_packages(include=["pretrain", "pretrain.*"])],
    package_dir={"fused_objectives": "kernels/fused_objectives"},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "datasets>=5.0",
        "tokenizers",
        "safetensors",
        "pydantic>=2.8",
        "pyyaml",
        "numpy",
        "scipy",
        "scikit-learn",
        "matplotlib",
        "pyarrow",
        "zstandard",
        "tensorboard",
        "packaging",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "ruff", "triton>=3.6", "liger-kernel>=0.8.5", "opacus>=1.6"],
        "benchmarks": ["accelerate", "liger-kernel>=0.8.5", "opacus>=1.6"],
        "salient": ["spacy>=3.8"],
        "track": ["wandb", "trackio"],
    },
    entry_points={"console_scripts": ["medley = pretrain.cli:main"]},
)
