"""Human ratings of real text: the data set that the examples train on.

The source distribution of vaderSentiment 3.3.2 (MIT licence) carries four sets of short texts that at least 15 people
each rated from -4 (extremely negative) to 4 (extremely positive). The wheel does not carry them.
C. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", 2014.
"""

import ast
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..pretrained import cache_folder

NAMES = ("movieReviewSnippets", "tweets", "nytEditorialSnippets", "amazonReviewSnippets")
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SAME_MEAN = 1e-6  # means are printed with nine decimals
_MOST_DISAGREEING = 0.1  # share of rows; 199 of the 4,200 tweets do


def fetch(name: str) -> Path:
    """Download one set once and return its parquet file: id, text, ratings (list), rating (their mean), split.

    An archive that already lies in the cache folder under its own name is used instead of a download.
    """
    if name not in NAMES:
        raise ValueError(f"`vader:{name}`: there is no such set; choose one of {', '.join(NAMES)}")
    target = cache_folder() / "vader" / f"{name}.parquet"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder, so that the last step is a rename: other processes see all of the file or none of it.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        kept = cache_folder() / ARCHIVE
        archive = kept if kept.exists() else download(Path(scratch))
        check_archive(archive)
        rows = read_archive(archive, name)
        written = Path(scratch) / target.name
        pq.write_table(pa.Table.from_pylist(rows), written)
        os.replace(written, target)
    return target


def download(folder: Path) -> Path:
    """Let pip bring the source distribution into `folder`: it knows the user's proxy, mirror and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2"]
    command += ["-d", str(folder), "--quiet"]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")  # else pip downloads setuptools just to read the metadata
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / ARCHIVE
    if finished.returncode or not archive.exists():
        reason = (finished.stderr.strip() or "pip brought no archive").splitlines()[-1]
        raise ValueError(
            f"pip could not download vaderSentiment 3.3.2 ({reason}); connect to a package index, or put "
            f"{ARCHIVE} from the Python package index into {cache_folder()}"
        )
    return archive


def check_archive(archive: Path) -> None:
    """Compare the archive's sha256 with the one that these functions were written for."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise ValueError(
            f"{archive.name} is damaged or not the file expected: its sha256 is {found}, expected {ARCHIVE_SHA256}; "
            f"delete {cache_folder() / ARCHIVE} if it is there, then try again"
        )


def read_archive(archive: Path, name: str) -> list[dict]:
    """The rows of one set, straight from the archive in the archive; nothing is unpacked on disk."""
    with tarfile.open(archive) as outer:
        inner = io.BytesIO(_member(outer, _INNER))
    with tarfile.open(fileobj=inner) as sets:
        texts = _member(sets, f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        ratings = _member(sets, f"hutto_ICWSM_2014/{name}_anonDataRatings.txt")
    return join(name, parse_texts(texts), parse_ratings(name, ratings))


def parse_texts(raw: bytes) -> dict[str, tuple[float, str]]:
    """id -> (mean rating, text) of a `_GroundTruth.txt`."""
    lines = [line.split("\t", 2) for line in _lines(raw.decode("utf-8-sig"))]
    # The files write a quotation mark as two apostrophes.
    return {key: (float(mean), text.replace("''", '"').strip()) for key, mean, text in lines}


def parse_ratings(name: str, raw: bytes) -> dict[str, list[float]]:
    """id -> single ratings of an `_anonDataRatings.txt`, checked against the mean on the same line."""
    ratings = {}
    # Latin-1 decodes any byte; the columns that are used are ASCII.
    for line in _lines(raw.removeprefix(b"\xef\xbb\xbf").decode("latin-1")):
        key, mean, _, values = line.split("\t", 3)
        ratings[key] = [float(value) for value in ast.literal_eval(values)]
        if not _same_mean(ratings[key], float(mean)):
            raise ValueError(f"vader:{name}, row {key}: the ratings {values} do not have the mean {mean} beside them")
    return ratings


def join(name: str, texts: dict[str, tuple[float, str]], ratings: dict[str, list[float]]) -> list[dict]:
    """Texts with their ratings, by id. Rows on which the two files disagree are left out, and counted.

    The order of the files differs (amazonReviewSnippets), and 199 tweets have another mean in one file than in the
    other: nothing says which of the two belongs to the text.
    """
    if texts.keys() != ratings.keys():
        odd = sorted(texts.keys() ^ ratings.keys())
        raise ValueError(f"vader:{name}: {len(odd)} ids stand in only one of its two files, such as {odd[0]}")
    rows = [
        {"id": key, "text": text, "ratings": ratings[key], "rating": mean, "split": split_of(key)}
        for key, (mean, text) in texts.items()
        if _same_mean(ratings[key], mean)
    ]
    left_out = len(texts) - len(rows)
    if left_out > _MOST_DISAGREEING * len(texts):
        raise ValueError(f"vader:{name}: in {left_out} of {len(texts)} rows the ratings do not have the stated mean")
    if left_out:
        rank_zero_info(f"vader:{name}: left out {left_out} of {len(texts)} rows, whose two stated means differ")
    return rows


def split_of(key: str) -> str:
    """train (80%), validation (10%) or test (10%), by a hash of the row's id: the same on every machine."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def _same_mean(ratings: list[float], mean: float) -> bool:
    return bool(ratings) and abs(sum(ratings) / len(ratings) - mean) < _SAME_MEAN


def _lines(text: str) -> list[str]:
    # Not splitlines(): it also cuts at characters that may stand inside a text, such as U+2028.
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"{ARCHIVE} holds no {name}; fetch vaderSentiment 3.3.2 again")
    return file.read()
