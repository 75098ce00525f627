"""Contracts that others can call: what the parts of this library promise, checked on a part of one's own."""

from marl_memory.testing.memory_operator import check_memory_operator

__all__ = ["check_memory_operator"]
