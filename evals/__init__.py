"""Evaluation of cache policies on long inputs. Start with ``evals/README.md``."""
