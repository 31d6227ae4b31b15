"""Whole training runs, as ordinary clients of the Python door.

Owns: data sources, batch order, schedules, the loop of each adapter, metrics files, resuming,
evaluation, the live view, trackers and the report page.
Does not own: tensors, merging of adapters, file formats of adapters.
Talks to: `api` (operations), `checkpoint` (which state is newest), `config` and `types` below.
"""
