"""Widths by measured latency: tables, the solver, the front, and the loop that measures what was planned."""
