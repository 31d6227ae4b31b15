"""Bytes: connections, bodies and their limits, keys, routes, and errors as answers."""
