"""Learners: one file per loss."""
