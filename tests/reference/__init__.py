"""The equations in plain NumPy, float64, written from the paper: slow, direct, one example at a
time where that reads better. They share no code with the package."""
