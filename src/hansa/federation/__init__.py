"""Federated training: the tree, messages, methods, engines."""
