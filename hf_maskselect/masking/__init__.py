"""Masks: targets, scores, patterns, schedules and mask sets.

This package imports torch, safetensors and `utils`, and nothing of transformers, so that it can be used alone.
"""
