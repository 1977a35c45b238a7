"""Measure indexers that speak the RFC #1403 routes as black boxes: see README.md."""
