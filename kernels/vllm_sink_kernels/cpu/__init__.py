"""The CPU's loops, compiled by Numba; compared with the reference too."""
