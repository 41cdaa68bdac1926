"""Reading training data: a hub id, files, folders, `vader:NAME` or `datasets` objects, all to one `DatasetDict`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from . import vader

if TYPE_CHECKING:
    Source: TypeAlias = str | Dataset | DatasetDict
else:
    # For the command line: where it sees a class, it takes a file's name for that of a configuration of the class, and
    # gives us the file's content.
    Source: TypeAlias = str | Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}

# Column names that are understood without a flag; the first of each is TRL's.
ACCEPTED = {
    "text": ("text",),
    "prompt": ("prompt", "input", "query", "question", "instruction"),
    "completion": ("completion", "output", "response", "answer"),
    "messages": ("messages", "conversations"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "preference": ("preference",),
    "label": ("label",),
    "ratings": ("ratings", "rating"),
    "responses": ("responses",),
    "ranks": ("ranks",),
}


def load_source(data: Source, flag: str = "data") -> DatasetDict:
    """Read `data` into splits named train, validation and test.

    Args:
        data: A hub id (`owner/name`, or `owner/name:config`), the path of a .jsonl, .json, .csv or .parquet file, a
            folder of those, `vader:NAME` (see vader.py), or a datasets object.
        flag: The argument that `data` came from, for error messages.

    Returns:
        The splits. Files of a folder are split by their names (train*, val*, test*). Data with one split only, whatever
        its name, is training data.
    """
    if isinstance(data, str):
        splits = load_string(data, flag)
    elif isinstance(data, Dataset):
        splits = {"train": data}
    elif isinstance(data, DatasetDict):
        splits = dict(data)
    else:
        raise ValueError(f"`{flag}` must be a string, a Dataset or a DatasetDict, not {type(data).__name__}")
    splits = name_splits(splits, describe(data, flag))
    for name, dataset in splits.items():
        if len(dataset) == 0:
            raise ValueError(f"{describe(data, flag)}: the {name} data has no rows; give data with at least one")
    return splits


def describe(data: Source, flag: str) -> str:
    """How error messages call this source."""
    return data if isinstance(data, str) else f"`{flag}`"


def fetch_source(data: Source | None, flag: str) -> None:
    """Bring what must be downloaded into the caches; local files are left for `load_source`."""
    if isinstance(data, str) and data.startswith("vader:"):
        vader.fetch(data.removeprefix("vader:"))
    elif isinstance(data, str) and not is_local(data):
        load_hub(data, flag)


def is_local(data: str) -> bool:
    """Whether a string names a file or folder, there or not, rather than a hub id."""
    looks_like_path = data.startswith(("/", "./", "../", "~")) or data.count("/") > 1
    return looks_like_path or Path(data).suffix.lower() in SUFFIXES or Path(data).exists()


def load_string(data: str, flag: str) -> dict[str, Dataset]:
    """Splits of a source given by name, as they are called there."""
    if data.startswith("vader:"):
        rows = Dataset(pq_table(vader.fetch(data.removeprefix("vader:"))))
        names = rows["split"][:]
        return {
            split: rows.select([i for i, name in enumerate(names) if name == split]).remove_columns("split")
            for split in dict.fromkeys(names)
        }
    if not is_local(data):
        return load_hub(data, flag)
    path = Path(data).expanduser()
    if not path.exists():
        raise ValueError(f"{data}: there is no such file or folder; check `{flag}` (relative to {Path.cwd()})")
    return read_folder(path) if path.is_dir() else {"train": read_file(path)}


def load_hub(data: str, flag: str) -> dict[str, Dataset]:
    """Splits of a data set on the Hugging Face hub, or of one in its cache."""
    name, _, config = data.partition(":")
    try:
        return dict(datasets.load_dataset(name, config or None))
    except OSError as error:  # not found, no network, no permission
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"`{flag}`: {data!r} is neither an existing file or folder nor a reachable hub id ({reason}); check the "
            "spelling, or give the path of a file"
        ) from error
    except ValueError as error:  # among others, a data set that needs a config
        raise ValueError(f"`{flag}`: cannot load {data!r} ({error}); a config is given as owner/name:config") from error


def name_splits(splits: dict[str, Dataset], where: str) -> DatasetDict:
    """Keep train, validation (or val) and test; a lone split becomes train."""
    if len(splits) == 1:
        return DatasetDict(train=next(iter(splits.values())))
    known = {SPLIT_NAMES[name]: rows for name, rows in splits.items() if name in SPLIT_NAMES}
    if "train" not in known:
        raise ValueError(f"{where}: none of its splits {sorted(splits)} is called train; pass one split as a Dataset")
    return DatasetDict(known)


def read_folder(folder: Path) -> dict[str, Dataset]:
    """All data files of a folder, by split if their names say one (train*, val*, test*), else as one."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: the folder holds no {', '.join(SUFFIXES)} file; put the data there")
    groups: dict[str, list[Path]] = {}
    for path in paths:
        split = next((SPLIT_NAMES[key] for key in SPLIT_NAMES if path.stem.lower().startswith(key)), "")
        groups.setdefault(split, []).append(path)
    if "" in groups and len(groups) > 1:
        raise ValueError(f"{groups[''][0]}: the name says no split while others in the folder do; call it train*, ...")
    joined = datasets.concatenate_datasets
    return {split: joined([read_file(path) for path in group]) for split, group in groups.items()}


def read_file(path: Path) -> Dataset:
    """One data file. Text formats are read whole, so that an error can name the line."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: cannot read a {suffix or 'suffixless'} file; expected one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return Dataset(pq_table(path))
        rows = read_csv(path) if suffix == ".csv" else read_json(path)
        if not rows:
            raise ValueError(f"{path}: the file has no rows; give data with at least one")
        names = dict.fromkeys(name for row in rows for name in row)
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8") from error
    except pa.ArrowException as error:
        raise ValueError(f"{path}: no table, or a column mixes types ({error}); mend the file") from error


def pq_table(path: Path) -> datasets.table.Table:
    """A parquet file as the table that `Dataset` takes, with no copy of it in the datasets cache."""
    return datasets.table.InMemoryTable(pq.read_table(path))


def read_json(path: Path) -> list[dict[str, Any]]:
    """JSON lines, or one JSON list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = list(enumerate(parse_json(text, path), 1))
    else:  # not splitlines(): U+2028 may stand inside a JSON string
        rows = [(i, parse_json(line, path, i)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line or item {number}: expected a JSON object {{...}}, found {str(row)[:40]!r}")
    return [row for _, row in rows]


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """`json.loads` with an error that names file and line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line or error.lineno}: not valid JSON ({error.msg}); mend or delete the line"
        ) from None


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line. Every value stays text: a prompt "12" is not a number."""
    previous_limit = csv.field_size_limit(2**31 - 1)  # the default refuses fields over 128 KiB
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} fields as in the "
                        "header; put quotes around values that hold commas"
                    )
                rows.append(row)
            return rows
    except csv.Error as error:
        # reader.line_num still counts the rows before; the inner reader has come to the bad line
        raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error}); mend the line") from None
    finally:
        csv.field_size_limit(previous_limit)


def find_column(dataset: Dataset, role: str, wanted: str | None, where: str, required: bool = True) -> str | None:
    """The column that plays `role`: the one the flag `{role}_column` names, else the one with an accepted name."""
    present = dataset.column_names
    if wanted is not None:
        if wanted not in present:
            raise ValueError(f"{where}: no column {wanted!r} (`{role}_column`); its columns are {present}")
        return wanted
    accepted = ACCEPTED[role]
    found = [name for name in accepted if name in present]
    if len(found) > 1 and found[0] != accepted[0]:
        raise ValueError(f"{where}: columns {found} could each be the {role}; name one with `{role}_column`")
    if not found and required:
        raise ValueError(
            f"{where}: no {role} column (looked for {', '.join(accepted)}); its columns are {present}; "
            f"name one with `{role}_column`"
        )
    return found[0] if found else None


def iterate(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Rows as dicts, read a thousand at a time: many times faster than indexing."""
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def select_roles(dataset: Dataset, columns: dict[str, str | None]) -> Dataset:
    """Only the columns that play a role, renamed to it; roles that no column plays are left out."""
    names = {role: name for role, name in columns.items() if name is not None}
    return dataset.select_columns(list(names.values())).rename_columns({name: role for role, name in names.items()})
