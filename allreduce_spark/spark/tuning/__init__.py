"""Hyper-parameter search: many fits side by side, each on ranks of its own."""
