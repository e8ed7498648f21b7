"""The operations as Triton kernels for CUDA devices. Imported only where a tensor is on one."""
