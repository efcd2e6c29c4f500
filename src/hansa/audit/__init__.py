"""What tampered third-party responses do to a model's answers, and what stops them.

A defensive instrument: it is pointed at one's own application, on recorded responses or over
loopback. Nothing in this package imports PyTorch but ``reader``, ``reader_training``, ``local``.
"""
