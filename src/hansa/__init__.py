"""Hansa: train models together without pooling the data.

``hansa.train`` runs a configuration; ``hansa.Federation`` runs a module, clients and a method of
one's own. The names are those of ``__init__.pyi``, each imported on first use: PyTorch takes
seconds, and ``hansa --help`` has no need of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
