"""Building blocks of methods, in plain torch: encoders, heads, losses, norms, memories, collectives."""
