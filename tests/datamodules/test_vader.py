import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lightning_rlhf.datamodules import vader
from lightning_rlhf.datamodules.sources import load_source

TEXTS = "\ufeff1\t0.5\tA ''fine'' film\tindeed\r\n2\t-1.33333333333\tcaf\u00e9\u2028!\r\n"
RATINGS = "\ufeff2\t-1.333333333\t0.4\t[-1, -1, -2]\r\n1\t0.5\t0.5\t[0, 1]\r\n"  # another order, as in the amazon set


def pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sdist(texts: str = TEXTS, ratings: str = RATINGS) -> bytes:
    inner = pack(
        {
            "hutto_ICWSM_2014/tweets_GroundTruth.txt": texts.encode(),
            "hutto_ICWSM_2014/tweets_anonDataRatings.txt": ratings.encode(),
        }
    )
    return pack({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch, cache):
    """Pretend that pip brings these bytes, and that they are the right ones."""

    def serve(content: bytes, sha256: str | None = None) -> list:
        downloads = []

        def download(folder):
            downloads.append(folder)
            (folder / vader.ARCHIVE).write_bytes(content)
            return folder / vader.ARCHIVE

        monkeypatch.setattr(vader, "download", download)
        monkeypatch.setattr(vader, "ARCHIVE_SHA256", sha256 or hashlib.sha256(content).hexdigest())
        return downloads

    return serve


def test_fetch_writes_the_rows_once(serve, cache):
    downloads = serve(sdist())
    path = vader.fetch("tweets")
    assert path == cache / "vader" / "tweets.parquet"
    assert pq.read_table(path).to_pylist() == [
        {
            "id": "1",
            "text": 'A "fine" film\tindeed',
            "ratings": [0.0, 1.0],
            "rating": 0.5,
            "split": vader.split_of("1"),
        },
        {
            "id": "2",
            "text": "café\u2028!",
            "ratings": [-1.0, -1.0, -2.0],
            "rating": -1.33333333333,
            "split": vader.split_of("2"),
        },
    ]
    assert vader.fetch("tweets") == path
    assert len(downloads) == 1
    assert [p.name for p in path.parent.iterdir()] == ["tweets.parquet"]


def test_as_a_source(serve):
    keys = [str(i) for i in range(40)]
    serve(sdist("".join(f"{k}\t1\ttext {k}\r\n" for k in keys), "".join(f"{k}\t1\t0\t[1]\r\n" for k in keys)))
    splits = load_source("vader:tweets")
    assert set(splits) == {"train", "validation", "test"}
    assert splits["train"].column_names == ["id", "text", "ratings", "rating"]
    assert sorted(key for rows in splits.values() for key in rows["id"]) == sorted(keys)


def test_an_archive_in_the_cache_folder_is_used(serve, cache):
    content = sdist()
    downloads = serve(content)
    cache.mkdir()
    (cache / vader.ARCHIVE).write_bytes(content)
    vader.fetch("tweets")
    assert downloads == []


def test_damaged_download_leaves_nothing(serve, cache):
    wrong = hashlib.sha256(b"damaged").hexdigest()
    serve(b"damaged", sha256="ab" * 32)
    with pytest.raises(ValueError, match=f"its sha256 is {wrong}, expected {'ab' * 32}; delete"):
        vader.fetch("tweets")
    assert list((cache / "vader").iterdir()) == []


def test_crash_while_writing_leaves_nothing(serve, cache, monkeypatch):
    def crash(table, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    serve(sdist())
    monkeypatch.setattr(vader.pq, "write_table", crash)
    with pytest.raises(OSError, match="disk full"):
        vader.fetch("tweets")
    assert list((cache / "vader").iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "ratings", "message"),
    [
        (
            TEXTS,
            RATINGS.replace("[0, 1]", "[0, 0]"),
            r"vader:tweets, row 1: the ratings \[0, 0\] do not have the mean 0.5",
        ),
        (TEXTS, RATINGS.replace("\n1\t", "\n3\t"), "2 ids stand in only one of its two files, such as 1"),
        (TEXTS.replace("0.5", "0.7"), RATINGS, "in 1 of 2 rows the ratings do not have the stated mean"),
    ],
)
def test_inconsistent_files(serve, texts, ratings, message):
    serve(sdist(texts, ratings))
    with pytest.raises(ValueError, match=message):
        vader.fetch("tweets")


def test_few_disagreeing_rows_are_left_out(monkeypatch):
    said = []
    monkeypatch.setattr(vader, "rank_zero_info", said.append)
    texts = {str(i): (1.0, f"t{i}") for i in range(20)} | {"3": (1.5, "t3")}
    rows = vader.join("tweets", texts, {str(i): [1.0, 1.0] for i in range(20)})
    assert [row["id"] for row in rows] == [str(i) for i in range(20) if i != 3]
    assert said == ["vader:tweets: left out 1 of 20 rows, whose two stated means differ"]


def test_missing_member(serve):
    serve(sdist())
    with pytest.raises(ValueError, match="holds no hutto_ICWSM_2014/movieReviewSnippets_GroundTruth"):
        vader.fetch("movieReviewSnippets")


def test_unknown_set():
    with pytest.raises(
        ValueError, match="`vader:films`: there is no such set; choose one of movieReviewSnippets, tweets"
    ):
        vader.fetch("films")


def test_pip_failure(monkeypatch, tmp_path, cache):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retry\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ValueError, match=r"\(ERROR: No matching distribution\).*put vaderSentiment-3.3.2.tar.gz from"):
        vader.download(tmp_path)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("LIGHTNING_RLHF_CACHE", "~/elsewhere")
    assert vader.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("LIGHTNING_RLHF_CACHE")
    assert vader.cache_folder() == Path.home() / ".cache" / "lightning_rlhf"


def test_split_shares_and_stability():
    splits = [vader.split_of(str(i)) for i in range(5000)]
    shares = {name: splits.count(name) / 5000 for name in ("train", "validation", "test")}
    assert 0.78 < shares["train"] < 0.82
    assert 0.08 < shares["validation"] < 0.12
    assert 0.08 < shares["test"] < 0.12
    # sha256sum and bc: the hashes of 1, 3 and 7 end in 5, 8 and 9
    assert [vader.split_of(key) for key in ("1", "3", "7")] == ["train", "validation", "test"]
