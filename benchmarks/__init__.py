"""The benchmarks measure whole steps; each prints a table and, with --out, writes it down."""
