"""The front end: prompts to tokens, tokens to text, a stream for each request, and the engine process.

Imports neither torch nor protobuf.
"""
