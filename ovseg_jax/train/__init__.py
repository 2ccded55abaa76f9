"""Training: joins models, losses, optimizer and data."""
