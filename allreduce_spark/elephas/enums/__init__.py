"""The words of `mode` and `frequency`."""
