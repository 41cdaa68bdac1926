"""Where a model comes from: command, versions, machine, git state and data, as plain values for a JSON file.

Environment variables are not kept. What looks like a password, a key or a token in a command or a URL is masked.
"""

import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lightning-rlhf", "torch", "lightning", "transformers", "peft", "datasets", "huggingface_hub")
MASK = "***"
_HASHED_ROWS, _HASHED_BYTES, _ROWS_AT_ONCE = 10_000, 64 * 2**20, 100

# The last word of a name that holds a secret: `--hf_token`, `apiKey=`, `"Authorization": `; not `max_new_tokens`.
_SECRET = "api_?key|key|keys|token|password|passwd|pwd|passphrase|secret|secrets|credential|credentials|authorization"
_NAMED_SECRET = re.compile(rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:{_SECRET})$")
_MASKS = (
    (re.compile(r"(\w[\w+.-]*://)[^/\s@]+@"), rf"\1{MASK}@"),  # https://user:password@host
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]+"), rf"\1 {MASK}"),  # a header
    (re.compile(r"\b(hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-)[\w-]{8,}"), rf"\1{MASK}"),  # tokens known by sight
    (
        re.compile(rf"""((?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:{_SECRET})["']?\s*[=:]\s*["']?)[^\s"',;&}}\]]+"""),
        rf"\1{MASK}",
    ),
)


def collect(
    argv: Sequence[str] | None = None, data: Any = None, seed: int | None = None, world_size: int = 1
) -> dict[str, Any]:
    """What a run's results depend on, as far as it can be known at its start.

    Args:
        argv: the command line, program first; None is this process's.
        data: the DataModule, already set up; see `fingerprint`.
        seed: what `seed_everything` set.
        world_size: number of processes.
    """
    return {
        "command": command_line(sys.argv if argv is None else argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "world_size": world_size,
        "versions": versions(),
        "hardware": hardware(),
        "git": git_state(),
        "data": fingerprint(data),
    }


# --- secrets ----------------------------------------------------------------------------------------------------------


def masked(text: str) -> str:
    """A text without the secrets that can be told by their names or their looks.

    Example:
        >>> masked("https://me:pw@host/data?token=abc&rows=9 --data.max_length 9")
        'https://***@host/data?token=***&rows=9 --data.max_length 9'
    """
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


def command_line(argv: Sequence[str]) -> str:
    """A command as one types it, secrets masked.

    Example:
        >>> command_line(["train.py", "fit", "--model.max_new_tokens", "8", "--hf_token", "abc", "--api-key=d e"])
        'python train.py fit --model.max_new_tokens 8 --hf_token *** --api-key=***'
    """
    words, is_value_secret = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        names_secret = flag.startswith("-") and _NAMED_SECRET.search(flag) is not None
        if is_value_secret and not word.startswith("--"):
            words.append(MASK)
        elif names_secret and equals:
            words.append(f"{flag}={MASK}")
        else:
            words.append(masked(word))
        is_value_secret = names_secret and not equals
    if words:
        words[0] = Path(words[0]).name
    safe = "-masked-"  # stars would be quoted
    quoted = [shlex.quote(word.replace(MASK, safe)).replace(safe, MASK) for word in words]
    return " ".join(["python", *quoted] if words and words[0].endswith(".py") else quoted)


# --- software and hardware --------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Platform, processor and GPUs of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpu": _cpu_model(), "cpu_cores": cores, "gpus": gpus}


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


# --- code -------------------------------------------------------------------------------------------------------------


def git_state(folder: str | Path = ".") -> dict[str, Any] | None:
    """Commit, branch, and whether tracked files differ from the commit; None outside a repository or without git.

    Never asks, never writes, and takes at most some seconds. On a detached head the branch is None.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = commit and _git(folder, "status", "--porcelain", "--untracked-files=no")
    if not commit or changes is None:
        return None
    branch = _git(folder, "symbolic-ref", "--short", "--quiet", "HEAD") or None
    return {"commit": commit, "branch": branch, "dirty": bool(changes)}


def _git(folder: str | Path, *arguments: str) -> str | None:
    """What a git command prints; None if it fails."""
    quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL, env={**os.environ, **quiet}
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- data -------------------------------------------------------------------------------------------------------------


def fingerprint(data: Any) -> dict[str, Any] | None:
    """What a DataModule reads: its sources, and of each split rows, columns and a hash of the content.

    The hash is over rows in their order, as JSON with sorted keys: the same on every machine, whatever the file format.
    It ends after 10,000 rows or 64 MiB, whichever comes first; `hashed_rows` says how many it covers. (The fingerprint
    of `datasets` differs from process to process.)

    Args:
        data: a DataModule of this package, set up: it has `rows`, a dict of `datasets.Dataset`. Of any other only the
            name of its class is known; None is None.
    """
    if data is None:
        return None
    sources = {flag: _source(value) for flag, value in getattr(data, "sources", {}).items() if value is not None}
    rows = getattr(data, "rows", None)
    splits = {name: _split(dataset) for name, dataset in rows.items()} if isinstance(rows, dict) else {}
    return {"module": type(data).__name__, "sources": sources, "splits": splits}


def _source(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        return {"name": f"a {type(value).__name__} object", "hub": False}
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", value) is not None and not Path(value).exists()
    return {"name": masked(value), "hub": on_hub}


def _split(dataset: Any) -> dict[str, Any]:
    digest, hashed, size = hashlib.sha256(), 0, 0
    for start in range(0, min(len(dataset), _HASHED_ROWS), _ROWS_AT_ONCE):
        columns = dataset[start : min(start + _ROWS_AT_ONCE, _HASHED_ROWS)]
        for values in zip(*columns.values(), strict=True):
            row = json.dumps(dict(zip(columns, values, strict=True)), sort_keys=True, default=str).encode()
            digest.update(row + b"\n")
            hashed, size = hashed + 1, size + len(row)
        if size >= _HASHED_BYTES:
            break
    return {
        "rows": len(dataset),
        "columns": list(dataset.column_names),
        "sha256": digest.hexdigest(),
        "hashed_rows": hashed,
    }
