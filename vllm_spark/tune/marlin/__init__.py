"""TODO marlin."""
