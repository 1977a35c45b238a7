"""Redis: the durable, shared copy of the index, never in the path of a query."""
