"""The checks of a machine's first GPU."""
