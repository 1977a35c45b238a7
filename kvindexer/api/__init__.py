"""HTTP: the routes of RFC #1403, /v1, health and metrics."""
