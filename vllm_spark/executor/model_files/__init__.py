"""Which files each rank loads, where they are, and whether both ranks have the same."""
