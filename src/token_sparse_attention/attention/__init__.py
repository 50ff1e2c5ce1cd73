"""What runs on the compressed tokens."""
