"""Triton kernels of the stages; private, reached through the stages' dispatchers.

Lengths are runtime values everywhere: block sizes follow from head size, group and settings,
never from a sequence's length, so a new length compiles nothing.
"""
