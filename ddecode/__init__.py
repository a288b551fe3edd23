"""Distil an image auto-regressive model into one or two steps."""

__version__ = "0.1.0"  # before the imports, which read it

from ddecode.checkpoint import load_teacher
from ddecode.pipeline import DistilledPipeline

__all__ = ["DistilledPipeline", "load_teacher"]
