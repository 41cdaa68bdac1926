"""Files of runs made by hand, with figures that can be worked out, and a reader of the pages made from them."""

import csv
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = '<script>alert("x")</script> & <b>'
VOID = {"meta", "link", "br", "img", "hr", "input"}


def write_csv(path: Path, rows: list[dict]) -> Path:
    """Rows as a CSV file; what a row lacks is an empty field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def rollout_rows(iterations: int = 3, reward: float = 1.0) -> list[dict]:
    """Two optimizer steps in each iteration; the reward of iteration e is e * `reward`, its KL 2 e."""
    rows = []
    for e in range(iterations):
        rows += [{"epoch": e, "step": 2 * e + i, "policy/grad_norm": 1.0 + i} for i in range(2)]
        times = {"time/rollout": 3.0, "time/update": 1.0, "time/iteration": 5.0}
        rollout = {"rollout/reward": reward * e, "rollout/kl": 2.0 * e, "rollout/reward/gold": 0.1 * e}
        rows.append({"epoch": e, "step": 2 * e + 1, **rollout, **times, "throughput/tokens_per_second": 100.0})
    return rows


def held_out_rows(iteration: int, rewards: list[float], **columns: list) -> list[dict]:
    """Rows of one evaluation; the reward of each and other columns are given."""
    rows = []
    for i, reward in enumerate(rewards):
        row = {"iteration": iteration, "step": 2 * iteration, "prompt": f"prompt {i}"}
        row |= {"response": f"words {iteration} {i}", "reward": reward, "kl": float(iteration), "length": 5 + i}
        row |= {"ended": True} | {name: values[i] for name, values in columns.items()}
        rows.append(row)
    return rows


class Page(HTMLParser):
    """A page's elements; fails on one that is closed in the wrong place, or never."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and not {"style", "script"} & set(self.open):
            self.texts.append(" ".join(data.split()))

    def values(self, name: str) -> list[str]:
        """What an attribute is, wherever it is."""
        return [value for _, attribute, value in self.attributes if attribute == name]

    def links(self) -> list[str]:
        """What the page's links and images name, without places in the page itself."""
        return [value for value in self.values("href") + self.values("src") if not value.startswith("#")]
