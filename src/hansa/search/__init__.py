"""Search an architecture: the space's table, searchers, proxies and blockwise training."""
