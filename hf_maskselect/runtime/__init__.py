"""A model on a CPU: linear layers that use zeros and 8-bit numbers, chosen by their measured speed."""
