"""Copies models, tokenizers and adapters from the machine that has them to the one that does not, over the channel."""
