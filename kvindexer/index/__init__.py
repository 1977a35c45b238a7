"""Which block lies where: the in-memory index behind one narrow seam."""
