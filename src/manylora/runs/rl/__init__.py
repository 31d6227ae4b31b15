"""Reinforcement learning is a kind of run: it samples, has the samples scored, and trains on them.

Owns: rewards and hooks, groups and their advantages, the terms of the objective, versions of the
weights and which of them sample for which step.
Does not own: the decode loop, the losses, the life of a run.
"""
