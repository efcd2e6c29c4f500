"""A model's life as one list of stages, each of which reads the bundle of one before it."""

from hansa.pipeline.options import PipelineOptions, load
from hansa.pipeline.run import Piped, Planned, pipeline, plan

__all__ = ["Piped", "PipelineOptions", "Planned", "load", "pipeline", "plan"]
