"""Sparse training of convolutions and linear layers, faster on ordinary processors."""
