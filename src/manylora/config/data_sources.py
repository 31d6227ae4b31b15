"""A run file names its data by a local file or by a hub id."""

import re
from pathlib import Path

from manylora.config.settings import problem

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
# What names a file as well, though none that is read: nothing of the kind is asked of a hub.
_OTHER_SUFFIXES = frozenset(
    {".json", ".ndjson", ".tsv", ".txt", ".md", ".yaml", ".yml", ".xml", ".html"}
    | {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"}
    | {".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx", ".ods", ".db", ".sqlite"}
    | {".pkl", ".npy", ".npz", ".h5", ".bin", ".safetensors"}
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def data_suffix(source: str) -> str:
    """Return how a file's name ends: one of `DATA_SUFFIXES`, or something that is not read."""
    known = [suffix for suffix in DATA_SUFFIXES if source.lower().endswith(suffix)]
    return max(known, key=len) if known else Path(source).suffix.lower()


def is_data_file(source: str) -> bool:
    """Return whether a data source is a local file (otherwise it is a hub id): it looks like a
    path, or ends as files do. Whether it can be read is another question."""
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
        or data_suffix(source) in {*DATA_SUFFIXES, *_OTHER_SUFFIXES}
    )


def check_source(value: str) -> str:
    """Return what names a data source, if it is one that can be read."""
    files = f"{', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]}"
    if is_data_file(value):
        if data_suffix(value) not in DATA_SUFFIXES:
            raise problem(f"is {value!r}; of local files {files} are read")
        return value
    if _HUB_ID.fullmatch(value):
        return value
    raise problem(
        f"is {value!r}; name a {files} file, or a hub id such as org/name or org/name:split"
    )
