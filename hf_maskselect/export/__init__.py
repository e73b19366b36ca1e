"""Sparse models in the forms that other engines take."""
