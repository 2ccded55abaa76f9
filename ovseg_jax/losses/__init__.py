"""The training objective (Sec. 3.2), one value per example. Nothing here knows a model."""
