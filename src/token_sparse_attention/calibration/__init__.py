"""Which layers of a model run sparse, and how much: measured on the model itself."""
