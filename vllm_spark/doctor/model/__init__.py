"""The checks of a model on one machine: its files and its memory, and the question that asks for them."""
