"""One call that proves and times the GPU kernels on the machine it runs on: `python -m kernels.gpu_report`."""
