"""Package layout; everything else is in pyproject.toml.

``kernels/`` holds the import package ``vllm_sink_kernels``: a top-level module
called ``kernels`` would shadow the Hugging Face package of that name, which
transformers imports.
"""

from setuptools import find_packages, setup

PACKAGES = [
    *find_packages(include=["vllm_sink", "vllm_sink.*"]),
    *find_packages("kernels"),
]

setup(
    packages=PACKAGES,
    package_dir={"vllm_sink_kernels": "kernels/vllm_sink_kernels"},
)
