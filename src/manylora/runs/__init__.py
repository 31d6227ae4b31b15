"""This room holds training runs as clients of the host: a run's life, and the kinds of run.

Owns: data sources, encoding and order; learning-rate schedules; the plan of a run; driving it;
metrics and reports.
Does not own: how an adapter is trained (engine, which api opens), what a run file may say
(config).
Talks to: api and config below; cli and quickstart use it.
"""
