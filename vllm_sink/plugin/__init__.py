"""The seams with vLLM's engine, its platforms and Ray."""
