"""Networks and their weights: plain fields in, arrays out."""
