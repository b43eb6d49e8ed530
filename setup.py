"""Package layout; everything else is in pyproject.toml.

``kernels/`` holds the import package ``vllm_sink_kernels``: a top-level module
called ``kernels`` would shadow the Hugging Face package of that name, which
transformers imports.
"""

from setuptools import setup

setup(
    packages=["vllm_sink", "vllm_sink_kernels"],
    package_dir={"vllm_sink_kernels": "kernels/vllm_sink_kernels"},
)
