"""Bytes are handled here: connections, bodies, limits, keys, routes, and errors as answers."""
