"""Drafters: what proposes tokens for the target model to verify (README.md)."""
