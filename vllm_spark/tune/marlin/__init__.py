"""Tuning of Marlin's kernel for experts: test problems and search."""
