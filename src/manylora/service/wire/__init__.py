"""The Tinker wire is data here: JSON messages, the protobuf schema, the way to `types` and back.

Owns: what a request must look like, what an answer looks like, and every limit on both.
Does not own: routes and status codes (service), what a request does (the hub).
Talks to: types only. No torch, no HTTP.
"""
