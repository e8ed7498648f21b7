"""CUDA C++ for what Triton cannot say well. Sources stand beside this file; NVRTC compiles them on first use.

Nothing here is needed to run: where `cuda.bindings` or NVRTC is missing, callers keep to their torch forms.
"""
