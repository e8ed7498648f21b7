"""The base model on disk: finding it, knowing its shape, telling it from others.

Imports neither torch nor transformers, so the front end, the trainer's argument checks and adapter
validation can use it; converting the embedded default happens in a process of its own.
"""
