"""Installer: maps the repository's top-level folders into the single import name ``zoo``."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = {
    "zoo": "zoo",
    "zoo.backbones": "backbones",
    "zoo.heads": "heads",
    "zoo.kernels": "kernels",
    "zoo.configs": "configs",
    "zoo.tools": "tools",
}

# mmengine 0.10 uses what Python 3.14 no longer has, and distutils, which comes with setuptools from Python 3.12 on.
# mmsegmentation accepts mmcv below 2.2 only, and needs ftfy and regex to be imported.
SEGMENTATION_FRAMEWORKS = [
    "segmentation-models-pytorch>=0.6",
    *(
        f"{requirement}; python_version < '3.14'"
        for requirement in (
            "ftfy>=6.1",
            "mmcv-lite>=2.1,<2.2",
            "mmengine>=0.10.7,<1.0",
            "mmsegmentation>=1.2.2,<2.0",
            "regex",
            "setuptools",
        )
    ),
]

EXTRAS = {
    "train": [
        "accelerate>=1.2",
        "matplotlib>=3.8",
        "omegaconf>=2.3",
        "rich>=13.0",
        "scikit-learn>=1.4",
        "tensorboard>=2.18",
        "torchmetrics>=1.4",
        "tqdm>=4.66",
    ],
    "data": ["elpv-dataset>=1.0", "webdataset>=1.0"],
    "seg": ["accelerate>=1.2", "albumentations>=2.0", "torchmetrics>=1.4", *SEGMENTATION_FRAMEWORKS],
    "det": [
        "accelerate>=1.2",
        "albumentations>=2.0",
        "faster-coco-eval>=1.6",
        "pycocotools>=2.0.8",
        "torchmetrics>=1.4",
    ],
    "vlm": ["open-clip-torch>=2.30", "peft>=0.13", "transformers>=5.19"],
    "explain": ["grad-cam>=1.5", "matplotlib>=3.8"],
    "web": ["gradio>=6.31", "matplotlib>=3.8"],
    "cpu": ["numba>=0.60"],  # compiled loops: scans on CPUs are several times faster
    "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.7"],
}
EXTRAS["all"] = sorted({requirement for group in EXTRAS.values() for requirement in group})
EXTRAS["dev"] = [
    *EXTRAS["all"],
    "playwright>=1.50",  # drives a Chromium that is installed apart
    "pre-commit>=3.7",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=77",
]


def find_packages() -> list[str]:
    """Lists every importable package below the mapped folders, under its ``zoo.`` name."""
    packages = []
    for name, folder in FOLDERS.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            packages.append(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    return packages


def read_version() -> str:
    namespace: dict[str, str] = {}
    exec((ROOT / "zoo" / "version.py").read_text(), namespace)
    return namespace["__version__"]


setup(
    name="vision-ssm-zoo",
    version=read_version(),
    description="Vision and multimodal state-space models on one fast scan kernel, through timm's create_model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(),
    package_dir=FOLDERS,
    package_data={"zoo": ["pretrained/*"], "zoo.configs": ["**/*.yaml", "**/*.json"]},
    install_requires=["torch>=2.11", "torchvision>=0.26", "timm>=1.0.29", "safetensors>=0.4"],
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
