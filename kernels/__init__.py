"""Paged attention and the kernels around it. Imports nothing: some libraries import this file by name."""

__version__ = "0.0.0"
