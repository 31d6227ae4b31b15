"""The quickstart: eight small tasks that show eight adapters on one base model.

Owns: the word list (`words`) and the tasks (`tasks`) with their examples and LoRA settings.
Does not own: training, generation, files, or the base model `seedling` itself.
Talks to: nobody. It is pure Python; the command line reads its tasks and hands examples and
settings to whoever trains.
"""
