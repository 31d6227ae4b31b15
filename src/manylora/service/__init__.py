"""This room serves over HTTP: it speaks the Tinker wire so that the stock `tinker` SDK drives it.

Owns: in `http`, bytes: routes, bodies and their limits, keys in headers, what an error looks like
to a client. In `wire`, the wire's messages and tensors. In `state`, sessions, sequence numbers,
checkpoints and results, behind the one contract that the routes know (`contract.Hub`). Here, the
process that puts them together (`serve`).
Does not own: adapters and their numbers (hosting), queues (scheduler), the journal's files
(journal), tables (store).
Talks to: hosting, runs, journal and store below; cli starts it. `http` and `wire` do not know
torch.
"""
