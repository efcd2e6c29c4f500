"""A bundle in other hands: verified with its ancestors, described, and in the forms of others."""

from hansa.handover.describe import describe
from hansa.handover.export import export
from hansa.handover.lineage import verify

__all__ = ["describe", "export", "verify"]
