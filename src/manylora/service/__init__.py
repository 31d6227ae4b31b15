"""The doors over HTTP: the Tinker wire, spoken so that the stock `tinker` SDK drives it.

Owns: bytes: routes, bodies and their limits, the wire's messages and tensors, keys in headers, what
an error looks like to a client. And state: sessions, sequence numbers, results (`hub`), behind the
one contract that the routes know (`contract.Hub`).
Does not own: adapters and their numbers (api), queues and the journal (scheduler), tables (store).
Talks to: api, scheduler and store below; cli starts it. The bytes' half does not know torch.
"""
