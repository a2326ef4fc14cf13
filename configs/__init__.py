"""Pipelines, budgets, models and data sets as YAML files, ready to copy."""
