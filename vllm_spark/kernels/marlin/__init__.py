"""vLLM's Marlin kernel for experts: rules of its tiles, tables, calls, search."""
