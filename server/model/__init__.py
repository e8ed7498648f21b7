"""The forward pass of the supported families, its weights, its KV tensors and its attention backends."""
