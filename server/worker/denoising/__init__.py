"""The reader of DENOISE spans: which masks of a block become tokens, and which."""
