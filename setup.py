"""Packaging metadata; every tool's settings are in pyproject.toml, the tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """Read the version without importing the package, whose requirements are not installed yet."""
    match = re.search(r'^__version__ = "([^"]+)"', (ROOT / "moco_d2" / "__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError("moco_d2/__init__.py has no __version__ line")
    return match[1]


def description() -> str:
    """Return the README without what PyPI cannot show: relative pictures, and the targets of relative links."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    text = re.sub(r"^!\[[^]]*\]\((?!https?://)[^)]*\)\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[((?:!\[[^]]*\]\([^)]*\)|[^]!])*)\]\((?!https?://)[^)]*\)", r"\1", text)


# Faster COCO evaluation with the same numbers, and the evaluators that LVIS and Cityscapes need.
EVAL = ["cityscapesscripts>=2.2.4", "faster-coco-eval>=1.8", "hotcoco>=1.3", "lvis>=0.5.3", "shapely>=2"]
VIT = ["timm>=1.0.20"]  # vision transformers
# The site that `make docs` makes. Its tools need Python 3.11; so does lint.
DOCS = [f"{name}; python_version >= '3.11'" for name in ("furo>=2025.9.25", "myst-parser>=5", "sphinx>=9")]

setup(
    name="moco_d2",
    version=version(),
    description="Pretraining without labels, checkpoint conversion and detection transfer for Detectron2",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="moco_d2 contributors",
    license="MIT",
    python_requires=">=3.10",
    # configs/ lies beside the package in a checkout, and inside it once installed; moco_d2.config finds both.
    packages=[*find_packages(include=["moco_d2", "moco_d2.*"]), "moco_d2.configs"],
    package_dir={"moco_d2.configs": "configs"},
    package_data={"moco_d2": ["**/*.yaml", "**/*.html", "samples/backbone.pth"], "moco_d2.configs": ["**/*.yaml"]},
    entry_points={"console_scripts": ["moco-d2 = moco_d2.__main__:main"]},
    # Our own needs and Detectron2's: install_detectron2.py installs it with --no-deps.
    install_requires=[
        "cloudpickle",
        "filelock",
        "fvcore>=0.1.5.post20221221",
        "hydra-core>=1.1",
        "iopath>=0.1.9",
        "jinja2>=3.1",
        "matplotlib>=3.7",
        "numpy>=1.26",
        "omegaconf>=2.1,<2.4",
        "opencv-python>=4.8",
        "packaging",
        "pillow>=10",
        "pycocotools>=2.0.7",
        "pyyaml>=5.1",
        "safetensors>=0.4",
        "setuptools<81",  # Detectron2's model_zoo imports pkg_resources, which setuptools drops later.
        "tabulate",
        "tensorboard>=2.14",
        "termcolor>=1.1",
        "torch>=2.4",
        "torchvision>=0.19",
        "tqdm>4.29",
        "yacs>=0.1.8",
    ],
    extras_require={
        "eval": EVAL,
        "vit": VIT,
        "docs": DOCS,
        "dev": [
            *DOCS,
            *EVAL,
            *VIT,
            "codespell>=2.3",
            "import-linter>=2.1",
            "ipykernel>=6.29",
            "lightly>=1.5",
            "mypy>=1.11",
            "nbclient>=0.10",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "pre-commit>=3.5",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "pytorch-lightning>=2.4",
            "ruff>=0.6",
            "transformers>=4.57",
            "webdataset>=1.0",
            "wheel",
        ],
    },
)
