"""Comparison with arrays that the released PyTorch code computed; see README.md here."""
