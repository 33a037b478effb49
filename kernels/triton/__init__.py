"""The CUDA back end of `Ops`: our own Triton kernels; `ops.TritonOps` is its face."""
