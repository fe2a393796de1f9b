"""From finished runs to numbers and pictures."""
