"""GPU kernels for what `reference.py` defines, in CUDA and in Triton."""
