"""Tuned parameters of Marlin and FusedMoE kernels: tables, what is valid, look-up, search and checks."""
