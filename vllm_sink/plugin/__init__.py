"""Where the plugin meets vLLM's engine and Ray."""
