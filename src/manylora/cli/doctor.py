"""`manylora doctor` checks the machine and what is installed."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import click

State = Literal["ok", "warn", "fail"]

NEEDED = (
    *("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "pydantic"),
    *("PyYAML", "click", "rich", "tensorboard"),
)
OPTIONAL = {
    "bitsandbytes": "for `quantization:`",
    "peft": "tests compare with it",
    "trackio": "for `trackio:`",
    "wandb": "for `wandb:`",
}
LITTLE_MEMORY, LITTLE_DISK = 4 * 2**30, 2 * 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """A `Finding` is one line of the report."""

    state: State
    name: str
    text: str


@click.command(
    epilog="Example: manylora doctor --json > doctor.json",
    short_help="Check this machine and what is installed; paste it into a bug report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Check this machine and what is installed; paste it into a bug report.

    Exit code 1 if something that every run needs is missing.
    """
    findings = list(examine())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.state:<4}  {finding.name.ljust(width)}  {finding.text}")
    return int(any(finding.state == "fail" for finding in findings))


def examine() -> Iterator[Finding]:
    """Make every check in turn; one that raises becomes a failure of its own."""
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("python", _python),
        ("memory", _memory),
        ("disk", _disk),
        ("packages", _packages),
        ("torch", _torch),
        ("seedling", _seedling),
    )
    for name, check in checks:
        try:
            yield from check()
        # A doctor reports what it meets.
        except Exception as error:
            yield Finding("fail", name, f"{type(error).__name__}: {error}")


def _python() -> Iterator[Finding]:
    state: State = "ok" if sys.version_info >= (3, 11) else "fail"
    yield Finding(state, "python", f"{platform.python_version()} (3.11 or newer is needed)")
    yield Finding("ok", "platform", platform.platform())
    yield Finding("ok", "cores", f"{usable_cores()} usable of {os.cpu_count()}")


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> Iterator[Finding]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(f"SC_{name}PHYS_PAGES") for name in ("", "AV"))
    except (ValueError, OSError, AttributeError):
        yield Finding("warn", "memory", "cannot be told on this platform")
        return
    state: State = "ok" if total >= LITTLE_MEMORY else "warn"
    yield Finding(state, "memory", f"{_gib(total)} ({_gib(free)} free)")


def _disk() -> Iterator[Finding]:
    usage = shutil.disk_usage(os.getcwd())
    state: State = "ok" if usage.free >= LITTLE_DISK else "warn"
    yield Finding(state, "disk", f"{_gib(usage.free)} free here, of {_gib(usage.total)}")


def _packages() -> Iterator[Finding]:
    for name in NEEDED:
        found = _version(name)
        yield Finding("ok" if found else "fail", name, found or "is not installed, and is needed")
    for name, purpose in OPTIONAL.items():
        yield Finding("ok", name, _version(name) or f"not installed (optional: {purpose})")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    if threads > cores:
        yield Finding("warn", "threads", f"{threads} on {cores} cores; set `threads: {cores}`")
    else:
        yield Finding("ok", "threads", str(threads))
    yield from _products()
    yield from _decoding()
    if not torch.cuda.is_available():
        yield Finding("ok", "cuda", "no device; runs use the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        major, minor = device.major, device.minor
        text = f"{device.name}, {_gib(device.total_memory)}, compute capability {major}.{minor}"
        yield Finding("ok", f"cuda:{index}", text)


def _products() -> Iterator[Finding]:
    """Tell how adapters are kept from changing each other's bits on this CPU."""
    import torch

    from manylora.kernels import DTYPES, PRODUCTS_ADVICE, whole_products

    cpu = torch.device("cpu")
    slow = [name for name, dtype in DTYPES.items() if not whole_products(cpu, dtype)]
    if not slow:
        yield Finding("ok", "products", "rows keep their bits whatever is beside them")
        return
    text = f"for {', '.join(slow)} of fixed sizes, so that rows keep their bits; it takes longer"
    if "fp32" in slow:
        yield Finding("warn", "products", f"{text} ({PRODUCTS_ADVICE})")
    else:
        yield Finding("ok", "products", text)


def _decoding() -> Iterator[Finding]:
    """Tell how many rows a step of decoding needs at least, for products of a usual size."""
    import torch

    from manylora.kernels import DTYPES, ladder, safe_packed, safe_plain

    counts, threads = ladder(16), torch.get_num_threads()
    found: list[str] = []
    for name in ("fp32", "bf16"):
        dtype = DTYPES[name]
        packed = safe_packed(576, 1536, False, dtype, threads, counts)
        plain = safe_plain(576, 1536, dtype, threads, counts, 16)
        if len(packed) == len(counts):
            found.append(f"{name} from 1 row on, with weights kept twice")
        else:
            found.append(f"{name} from {min(plain, default=16)} rows on")
    yield Finding("ok", "decoding", f"steps in {'; '.join(found)}")


def _seedling() -> Iterator[Finding]:
    from manylora.models import open_base, resolve_base
    from manylora.types import ManyloraError

    folder = resolve_base("seedling")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        yield Finding("warn", "seedling", f"its files are not at {folder}; quickstart cannot run")
        return
    try:
        base = open_base("seedling", device="cpu")
    except ManyloraError as error:
        yield Finding("fail", "seedling", str(error))
        return
    count = sum(parameter.numel() for parameter in base.model.parameters())
    yield Finding("ok", "seedling", f"opens; {count:,} parameters, {base.context_length} context")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
