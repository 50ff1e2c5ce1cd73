"""How far sparse prefill takes answers from dense ones: the work behind ``tsa fidelity``."""
