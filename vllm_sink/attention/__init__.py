"""The attention backend, on the CPU and the GPU."""
