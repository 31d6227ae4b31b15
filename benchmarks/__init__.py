"""Whole-step measurements; each prints a table and, with --out, writes it down."""
