"""The collectives of a fixed group of ranks: one contract (`base`), one file for each way to run it."""
