"""This room is the quickstart: eight small tasks show eight adapters on one base model.

Owns: the word list (`words`), the tasks (`tasks`) with their examples and LoRA settings, and the
command that writes them down as a run, trains it and shows the answers side by side (`run`).
Does not own: training, files, or the base model `seedling` itself.
Talks to: config, runs and api; the command line starts it.
"""
