"""From records to batches of NumPy arrays. Nothing here imports jax: worker processes load it."""
