"""4-bit weights on disk: reading and writing the checkpoints of bitsandbytes.

What the bits mean, and products with them, are `server.kernels.four_bit`'s; which layers are quantized is
`server.base.quantization`'s.
"""
