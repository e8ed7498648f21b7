"""A faster forward and backward pass for decoders of the Llama kind whose base is frozen.

It reads transformers' and PEFT's modules and changes none: what is saved, served or evaluated elsewhere is as it was.
"""

from trainer.fused.body import FusedBody
from trainer.fused.recognize import fuse, fuse_where_it_pays

__all__ = ["FusedBody", "fuse", "fuse_where_it_pays"]
