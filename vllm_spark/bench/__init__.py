"""What collectives and decode steps cost on this machine, beside what vLLM would use without this project."""
