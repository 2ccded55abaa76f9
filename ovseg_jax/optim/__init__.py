"""Schedules, parameter groups and the EMA teacher, as optax transformations."""
