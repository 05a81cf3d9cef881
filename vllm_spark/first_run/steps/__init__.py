"""The steps of a first run, a module for each kind; `first_run.sequence` has their order."""
