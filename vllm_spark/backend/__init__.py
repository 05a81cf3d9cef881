"""What vLLM instantiates, shows and asks of a pair: platform, communicators, metrics, log, status, what it supports."""
