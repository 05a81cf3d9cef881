"""vLLM's FusedMoE kernel in Triton: shapes, tables, checks and compilation."""
