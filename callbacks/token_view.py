"""Responses token by token, coloured by what training knows of each token."""

import math
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import lightning as L

from ..loggers import forgiving_io
from ._shared import Columns, write_atomically
from .sinks import log_html

MEASURES = {  # name in `per_token`: (title, what blue means, what red means)
    "kl": ("KL", "less likely than under the reference", "more likely than under the reference"),
    "advantage": ("advantage", "to be made rarer", "to be made more frequent"),
    "value": ("value", "lower than the average token", "higher than the average token"),
    "entropy": ("entropy", "sure of the token", "unsure of the token"),
}
CENTRED = {"value", "entropy"}  # their colours are about the mean of what is shown, the others' about 0
BLUE, RED = (37, 99, 235), (225, 60, 40)


class TokenView(L.Callback):
    """Write a page with some responses of an iteration, each token coloured by KL, advantage, value or entropy.

    Reads `pl_module.samples` and `pl_module.per_token`; a module without them is left alone. The page,
    `tokens/iteration_<n>.html` in the trainer's `default_root_dir`, needs no network and no script; the loggers get it
    as `tokens/view`. It shows the first responses, the best and the worst by reward.

    Args:
        every_n_epochs: show responses of every n-th iteration, starting with iteration 0.
        num_samples: how many of the first responses to show.
    """

    def __init__(self, every_n_epochs: int = 10, num_samples: int = 4) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"`every_n_epochs` must be at least 1, but is {every_n_epochs}.")
        if num_samples < 0:
            raise ValueError(f"`num_samples` must be at least 0, but is {num_samples}.")
        self.every_n_epochs = every_n_epochs
        self.num_samples = num_samples

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        samples, per_token = getattr(pl_module, "samples", {}), getattr(pl_module, "per_token", {})
        iteration = trainer.current_epoch
        if not samples or not per_token or not trainer.is_global_zero or iteration % self.every_n_epochs:
            return
        page = render(samples, per_token, pl_module.tokenizer, iteration, self.num_samples)
        path = Path(trainer.default_root_dir) / "tokens" / f"iteration_{iteration}.html"
        with forgiving_io(str(path)):
            write_atomically(path, page)
        for logger in trainer.loggers:
            log_html(logger, "tokens/view", page, trainer.global_step)


def render(samples: Columns, per_token: dict[str, Any], tokenizer: Any, iteration: int, count: int) -> str:
    """The page.

    Args:
        samples: columns of a rollout: prompt, reward, ...
        per_token: tensors (B, T) of the same rows: token_ids, mask, and what was measured of each token.
        tokenizer: decodes single tokens.
        iteration: its number.
        count: how many of the first responses to show.
    """
    rows = chosen_rows(samples["reward"], count)
    measures = [name for name in MEASURES if name in per_token]
    numbers = [name for name in per_token if name not in ("token_ids", "mask")]
    tokens = {row: _tokens(per_token, numbers, row) for row in rows}
    scales = {name: scale(name, [token[name] for row in rows for token in tokens[row]]) for name in measures}
    radios = "".join(
        f'<input type="radio" name="by" id="by-{name}"{" checked" if not i else ""}>'
        f'<label for="by-{name}">{MEASURES[name][0]}</label>'
        for i, name in enumerate(measures)
    )
    rules = "".join(
        f"#by-{name}:checked~main .t{{background:var(--{name})}}#by-{name}:checked~main .scale-{name}{{display:flex}}"
        for name in measures
    )
    legends = "".join(_legend(name, *scales[name]) for name in measures)
    articles = "".join(
        _article(label, samples, row, [_span(i, token, tokenizer, scales) for i, token in enumerate(tokens[row])])
        for row, label in rows.items()
    )
    return PAGE.substitute(iteration=iteration, rules=rules, radios=radios, legends=legends, articles=articles)


def chosen_rows(rewards: list[float], count: int) -> dict[int, str]:
    """Rows to show, with their labels: best, worst, and the first ones that are neither."""
    known = [row for row, reward in enumerate(rewards) if not math.isnan(reward)]
    labels = {}
    if known:
        labels[max(known, key=lambda row: rewards[row])] = "best"
        labels.setdefault(min(known, key=lambda row: rewards[row]), "worst")
    for row in range(min(count, len(rewards))):
        labels.setdefault(row, f"sample {row}")
    return labels


def scale(name: str, values: list[float]) -> tuple[float, float]:
    """Where a measure is without colour, and how far from there it has its full colour: centre and reach.

    The reach is the distance that 2% of the tokens exceed, so that a single token does not make all others pale.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    centre = sum(finite) / len(finite) if name in CENTRED else 0.0
    distances = sorted(abs(value - centre) for value in finite)
    return centre, distances[math.ceil(0.98 * len(distances)) - 1] or distances[-1] or 1.0


def colour(value: float, centre: float, reach: float) -> str:
    """Blue below the centre, red above; the stronger the farther away. It is laid over a light or a dark page."""
    if not math.isfinite(value):
        return "transparent"
    share = min(abs(value - centre) / reach, 1.0)
    red, green, blue = RED if value > centre else BLUE
    return f"rgb({red} {green} {blue}/{0.65 * share:.2f})"


def visible(text: str) -> str:
    """Escaped text in which white space can be seen; line breaks stay line breaks."""
    shown = {" ": "<i>·</i>", "\t": "<i>→</i>\t", "\n": "<i>⏎</i>\n", "\r": "<i>␍</i>"}
    return "".join(shown[char] if char in shown else escape(char) for char in text)


def token_text(tokenizer: Any, token: int) -> str:
    """A single token as text; one that holds a part of a character only, as its bytes: ⟨e2 80⟩, with narrow spaces."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    name = str(tokenizer.convert_ids_to_tokens(token))
    is_byte = name.startswith("<0x")  # SentencePiece's name of a byte, which can be read
    if "\ufffd" in text and not is_byte and all(char in _BYTES for char in name):
        return "⟨" + "\u202f".join(f"{_BYTES[char]:02x}" for char in name) + "⟩"
    if "\ufffd" in text or not text:
        return name
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def _byte_names() -> dict[str, int]:
    """The characters by which byte-level vocabularies name bytes: printable ones by themselves, others from 256 on.

    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_names()


def _tokens(per_token: dict[str, Any], numbers: list[str], row: int) -> list[dict[str, Any]]:
    """A response's tokens, each with its id and its numbers."""
    mask = per_token["mask"][row].bool()
    columns = {"id": per_token["token_ids"][row][mask].tolist()}
    columns |= {name: per_token[name][row][mask].float().tolist() for name in numbers}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _span(place: int, token: dict[str, Any], tokenizer: Any, scales: dict[str, tuple[float, float]]) -> str:
    facts = [f"{MEASURES.get(name, (name,))[0]} {value:.4g}" for name, value in token.items() if name != "id"]
    title = escape("\n".join([f"token {place + 1}, id {token['id']}", *facts]))
    colours = ";".join(f"--{name}:{colour(token[name], *reach)}" for name, reach in scales.items())
    return (
        f'<span class="t" title="{title}" style="{colours}">{visible(token_text(tokenizer, token["id"]))}</span><wbr>'
    )


def _article(label: str, samples: Columns, row: int, spans: list[str]) -> str:
    figures = {name: column[row] for name, column in samples.items() if name not in ("prompt", "response")}
    shown = "".join(f"<span>{escape(name)} <b>{escape(_figure(value))}</b></span>" for name, value in figures.items())
    prompt = escape(str(samples["prompt"][row]))
    return (
        f'<article><header><span class="label">{escape(label)}</span>{shown}</header>'
        f'<p class="prompt">{prompt}</p><p class="response">{"".join(spans)}</p></article>'
    )


def _legend(name: str, centre: float, reach: float) -> str:
    title, low, high = MEASURES[name]
    stops = ",".join(colour(centre + share * reach, centre, reach) for share in (-1, 0, 1))
    ticks = "".join(f"<span>{centre + share * reach:.3g}</span>" for share in (-1, 0, 1))
    return (
        f'<div class="scale scale-{name}"><span>{escape(low)}</span><div class="bar">'
        f'<div style="background:linear-gradient(to right,{stops})" aria-label="{escape(title)}"></div>'
        f'<div class="ticks">{ticks}</div></div><span>{escape(high)}</span></div>'
    )


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Tokens of iteration $iteration</title><style>
:root{color-scheme:light dark;--ink:#1f2328;--soft:#636c76;--line:#d8dee4;--page:#fff;--panel:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--line:#30363d;--page:#0d1117;--panel:#161b22}}
body{margin:0 auto;padding:1.5rem 1rem;max-width:58rem;color:var(--ink);background:var(--page);
font:16px/1.6 system-ui,sans-serif}
h1{font-size:1.25rem;margin:0 0 .25rem}.hint{color:var(--soft);margin:0 0 1rem;font-size:.875rem}
input{position:absolute;opacity:0}
label{display:inline-block;padding:.15rem .8rem;margin:0 .4rem .6rem 0;border:1px solid var(--line);border-radius:1rem;
cursor:pointer;font-size:.875rem}
input:checked+label{background:var(--ink);color:var(--page);border-color:var(--ink)}
input:focus-visible+label{outline:2px solid #2563eb;outline-offset:2px}
.scale{display:none;gap:.75rem;align-items:flex-start;margin:0 0 1.2rem;font-size:.8rem;color:var(--soft);
line-height:1.2}
.scale>span{flex:1 1 0}.scale>span:first-child{text-align:right}
.bar{flex:0 1 18rem;min-width:8rem}.bar>div:first-child{height:.9rem;border-radius:3px;border:1px solid var(--line)}
.ticks{display:flex;justify-content:space-between;margin-top:.2rem}
article{border:1px solid var(--line);border-radius:8px;margin:0 0 1rem;overflow:hidden}
header{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:.45rem .9rem;background:var(--panel);font-size:.8rem;
color:var(--soft);border-bottom:1px solid var(--line)}header b{color:var(--ink);font-weight:600}
.label{color:var(--ink);font-weight:700}
p{white-space:pre-wrap;overflow-wrap:anywhere;margin:.6rem .9rem}.prompt{color:var(--soft);margin-bottom:0}
.response{margin-top:.2rem}.t{border-radius:3px;padding:.12rem 0}.t:hover{outline:1px solid var(--ink)}
i{font-style:normal;opacity:.35}
$rules</style></head><body><h1>Tokens of iteration $iteration</h1>
<p class="hint">Prompt in grey, then the response. Point at a token for its numbers. · space, ⏎ line break.</p>
$radios<main>$legends$articles</main></body></html>
""")
