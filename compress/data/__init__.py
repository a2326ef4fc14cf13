"""Data sets: read, checked, hashed, drawn."""
