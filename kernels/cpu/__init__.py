"""The compiled CPU back end: C++ kernels built by the machine's own compiler and called through ctypes."""
