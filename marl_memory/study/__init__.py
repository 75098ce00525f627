"""Ablation studies: arms × tasks × seeds, run by one command, and the report on them."""

from marl_memory.study.frame import load

__all__ = ["load"]
