"""kvindexer: which inference pod holds which prompt prefix, on which tier, right now."""

__version__ = "0.1.0"
