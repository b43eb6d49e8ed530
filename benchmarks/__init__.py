"""Benchmarks: each answers one question and writes one CSV of one schema."""
