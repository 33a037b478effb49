"""Stores of the lookup drafters: what may follow a place (README.md)."""
