"""The CUDA kernels on the host: an emulator of the device, and Python modules of the kernels compiled for it."""
