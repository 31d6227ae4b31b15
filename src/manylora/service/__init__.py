"""HTTP doors: the Tinker wire, the runs API, keys.

Owns: what is said over HTTP, and the results that clients have yet to fetch.
Does not own: the engine, the order of operations, database tables.
Talks to: store, scheduler, api, types. It does not import torch itself.
"""
