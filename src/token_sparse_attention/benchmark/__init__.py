"""Benchmarks of the operator and of whole prefills, and the documentation made from them."""
