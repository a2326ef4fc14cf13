"""A model to look at: tables, pages and pictures."""
