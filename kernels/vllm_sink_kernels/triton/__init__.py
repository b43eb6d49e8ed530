"""The GPU's kernels; compared with :mod:`vllm_sink_kernels.reference`."""
