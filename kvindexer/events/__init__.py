"""Events in: bytes of publishers to ordered, verified payloads."""
