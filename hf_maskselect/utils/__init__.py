"""Helpers that know nothing about pruning."""
