"""Ways to switch the method on inside a model: one module per engine, imported on demand."""
