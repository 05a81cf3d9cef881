"""Models: configuration, layers, quantized weights, shards, and tiny models for tests."""
