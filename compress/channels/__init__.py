"""Which channels must be cut together: a model's graph, walked operation by operation."""
