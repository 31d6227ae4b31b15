"""This room is the `manylora` command.

Owns: commands, their options and what they print; exit codes; turning errors into messages.
Does not own: training, sampling or files: each command calls one room and shows what it gives.
Talks to: quickstart, runs, api, checkpoint and config below; no room imports it.
`--help` does not import torch.
"""
