"""The first minutes on a GPU: ceilings, parity, training modes and step times, measured row by row."""
