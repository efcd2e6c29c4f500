"""The runs folder in a browser, on this machine alone: list, filter, compare, watch."""

from hansa.ui.server import Server

__all__ = ["Server"]
