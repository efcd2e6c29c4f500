"""Models by name, and any class of the user's by ``module:Class``."""

from hansa.models.build import Architecture, build, objective_of, resolved, restore

__all__ = ["Architecture", "build", "objective_of", "resolved", "restore"]
