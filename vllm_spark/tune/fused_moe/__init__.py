"""TODO fused_moe."""
