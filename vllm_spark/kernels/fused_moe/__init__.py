"""vLLM's FusedMoE kernel in Triton: shapes, tables, compilation, search."""
