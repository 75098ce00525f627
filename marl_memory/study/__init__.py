"""Ablation studies: arms × tasks × seeds, run by one command, and the report on them."""
