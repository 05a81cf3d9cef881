"""What collectives cost on this machine, beside what vLLM would use without this project."""
