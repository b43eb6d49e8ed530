"""What vLLM asks of an attention backend, on the CPU and the GPU."""
