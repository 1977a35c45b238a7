"""Names, order and weights of the tiers that blocks lie on."""
