"""Triton forms of the operations in `kernels.reference`, with the same names and signatures, for NVIDIA GPUs.

Modules here import `triton` and are imported only where tensors are on such a device, or under its interpreter
(TRITON_INTERPRET=1), which runs them on a CPU. This package itself, and the tables in `plans` and `gemv_plans`, import
nothing of it.
"""
