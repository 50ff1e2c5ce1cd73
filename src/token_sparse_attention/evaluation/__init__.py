"""Accuracy of sparse prefill against dense prefill, on lm-evaluation-harness's tasks."""
