"""What is known of models: configuration, layers, weights, shards, tiny ones made on the spot."""
