"""Which blocks a request holds: vLLM's spec, its manager, the counters."""
