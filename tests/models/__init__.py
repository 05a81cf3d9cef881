"""Models and speculation that people serve, as tiny random checkpoints: the pair's answers against stock vLLM's."""
