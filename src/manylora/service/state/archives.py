"""An archive is a checkpoint's adapter as one tar file of PEFT's files, made when it is fetched."""

import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

from anyio import to_thread

from manylora.hosting.state_files import read_state, write_peft
from manylora.service.http_errors import Backpressure
from manylora.service.state.checkpoints import Checkpoints
from manylora.service.state.resources import Resources
from manylora.service.wire.paths import TinkerPath
from manylora.store import CheckpointRow

# Archives that are made or fetched at the same time; each takes its adapter's size on the disk.
MOST_OPEN = 8
CHUNK = 1 << 20
SCRATCH = ".archive-"


class TarArchive:
    """A `TarArchive` has `size` bytes and no name: nothing of it stays when it is closed, however
    that comes."""

    def __init__(self, file: IO[bytes], closed: Callable[[], None]):
        """Take a `file` at its end; `closed` is called once, when the archive is closed."""
        self.size = file.tell()
        self._file = file
        self._closed = closed
        file.seek(0)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what it holds, once."""
        while chunk := await to_thread.run_sync(self._file.read, CHUNK):
            yield chunk

    def close(self) -> None:
        """Give its room back."""
        if not self._file.closed:
            self._file.close()
            self._closed()


class Archives:
    """`Archives` are those of a server's checkpoints, each made when it is asked for."""

    def __init__(self, resources: Resources, checkpoints: Checkpoints):
        """Remove what a server that was killed left of its archives in the data directory."""
        for scratch in resources.folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(scratch, ignore_errors=True)
        self._resources = resources
        self._checkpoints = checkpoints
        self._open = 0

    async def open(self, tenant: str, path: TinkerPath) -> TarArchive:
        """Open the archive of a checkpoint that the tenant may read; the caller has to close it.
        Raises NotFound: there is no such checkpoint; Backpressure: too many are open;
        CheckpointDamaged, SaveFailed."""
        row = await self._checkpoints.readable(tenant, path, path.kind)
        if self._open >= MOST_OPEN:
            raise Backpressure(f"{MOST_OPEN} archives are being fetched; try again")
        self._open += 1
        try:
            file = await to_thread.run_sync(self._packed, row)
        except BaseException:
            self._closed()
            raise
        return TarArchive(file, self._closed)

    def _closed(self) -> None:
        self._open -= 1

    def _packed(self, row: CheckpointRow) -> IO[bytes]:
        folder, engine = self._checkpoints.folder_of(row), self._resources.host.engine
        if row.kind == "external_weights":
            return _pack(folder, self._resources.folder)
        state = read_state(engine, folder, called=row.path).state
        with tempfile.TemporaryDirectory(dir=self._resources.folder, prefix=SCRATCH) as scratch:
            peft = Path(scratch) / "peft"
            write_peft(engine, peft, state)
            return _pack(peft, self._resources.folder)


def _pack(folder: Path, place: Path) -> IO[bytes]:
    """Pack a folder's files as a tar: a nameless file on the disk of `place`, at its end."""
    target = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - the caller's to close
    with tarfile.open(fileobj=target, mode="w") as tar:
        for file in sorted(folder.iterdir()):
            if file.is_file():
                info = tar.gettarinfo(str(file), arcname=file.name)
                info.uid = info.gid = 0
                info.uname = info.gname = ""
                info.mode = 0o644
                with file.open("rb") as content:
                    tar.addfile(info, content)
    return target
