"""The journal keeps, in files that survive it, what a server acknowledged since the last saves.

Owns: records, the segments that they lie in, which of them are still needed, and reading them back
from damaged files.
Does not own: what a record means and how it is done again (service).
Talks to: types only; the service writes it and reads it. No torch.
"""

from manylora.journal.journal import Journal
from manylora.journal.record_format import Record
from manylora.journal.recovery import Damage, Recovery

__all__ = ["Damage", "Journal", "Record", "Recovery"]
