"""Whole training runs as clients of the Python door: sft, later rl.

Owns: data sources, encoding and order; learning-rate schedules; the plan of a run; driving it;
metrics and reports.
Does not own: how an adapter is trained (engine, behind the Python door), what a run file may say
(config).
Talks to: the Python door and config below; cli and quickstart use it.
"""
