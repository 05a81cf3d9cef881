"""Child processes, groups of them, signals and events."""
