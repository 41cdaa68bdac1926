"""What would be drawn in W&B, and what its server is told: a local one that answers as W&B's does."""

import inspect
import io
import json
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from lightning_rlhf.callbacks import Reliability, WandbAxes
from lightning_rlhf.callbacks.wandb_axes import BY_ITERATION, BY_STEP, SUMMARIES
from lightning_rlhf.wandb_workspace import (
    Curves,
    Media,
    Points,
    Section,
    Table,
    axis,
    curves,
    make_workspace,
    panels,
)

DOCS = Path(__file__).parents[1] / "docs/metrics.md"
TITLES = [
    *("Reward and KL", "Responses", "Policy updates", "Value model", "Reward model", "Preference methods", "Loss"),
    *("Samples", "Time and memory"),
]
NOT_DRAWN = {"progress/iteration", "val/kl_bound"}  # an axis, and a figure of a module that is only validated
OF_ALL_METHODS = {  # what modules log that sample, and others, too: optimizer steps are an axis that all have
    *("throughput/trained_tokens_per_second", "throughput/mfu", "memory/peak_gib"),
    *("val/kl", "val/kl_per_token", "val/entropy"),
}


def of_kind(kind: type) -> list:
    return [panel for section in panels() for panel in section.panels if isinstance(panel, kind)]


# --- what is drawn ----------------------------------------------------------------------------------------------------


def documented() -> set[str]:
    """All names of docs/metrics.md: a cell that ends in "and `val/`" names them for held-out data, too."""
    names, text = set(), DOCS.read_text()
    for line in text.splitlines():
        cell = line.split("|")[1] if line.startswith("| `") else ""
        listed = [name for name in re.findall(r"`([^`]+)`", cell) if not name.endswith("/")]
        names |= set(listed)
        if "`val/`" in cell:
            names |= {name.replace("train/", "val/") for name in listed}
        if "..." in cell:
            names |= {name.replace("rollout/", "val/") for name in names if name.startswith("rollout/")}
    return names | set(re.findall(r"`(frontier/\w+)`", text))


def test_documented_reads_the_page():
    expected = {"rollout/reward/<name>", "val/logprob_rejected", "val/response_length", "frontier/val_reward"}
    assert expected <= documented()
    assert not {name for name in documented() if "/" not in name}


def test_all_that_is_drawn_is_documented():
    drawn = {name for panel in of_kind(Curves) for name in panel.names}
    drawn |= {name for panel in of_kind(Points) for name in (panel.x, panel.y)}
    assert len(drawn) > 80
    assert drawn <= documented()


def test_all_that_is_documented_is_drawn():
    drawn = {name for panel in of_kind(Curves) for name in panel.names}
    drawn |= {table.name for table in of_kind(Table)} | {name for media in of_kind(Media) for name in media.names}
    held_out = {name.replace("rollout/", "val/") for name in documented() if name.startswith("rollout/")}
    assert {*documented(), *BY_ITERATION, *BY_STEP} - held_out - drawn == NOT_DRAWN  # not all that is measured twice


def test_sections_and_titles():
    assert [section.title for section in panels()] == TITLES
    for section in panels():
        titles = [panel.title for panel in section.panels if not isinstance(panel, Table)]
        assert len(titles) == len(set(titles))


def test_pictures_are_those_of_the_callback():
    described = inspect.cleandoc(Reliability.__doc__)
    (reliability,) = [panel for panel in of_kind(Media) if panel.title == "Reliability"]
    assert reliability.names == ("val/reliability", "val/reliability_levels")
    assert all(f"`{name}`" in described for name in reliability.names)


class TestAxes:
    @pytest.fixture(scope="class")
    def defined(self) -> dict[bool, dict[str, str]]:
        """What the callback tells W&B, for a module that samples and for another: the axis of each name."""

        class Run:
            def __init__(self):
                self.axes = {}

            def define_metric(self, name, step_metric=None, **_):
                self.axes[name] = step_metric

        def axes_of(module) -> dict[str, str]:
            run = Run()
            logger = type("Logger", (WandbLogger,), {"experiment": run})()
            trainer = SimpleNamespace(is_global_zero=True, loggers=[logger], callback_metrics={})
            callback = WandbAxes()
            callback.on_fit_start(trainer, module)
            callback.on_train_epoch_end(trainer, module)
            return run.axes

        return {True: axes_of(SimpleNamespace(samples={"reward/<name>": []})), False: axes_of(SimpleNamespace())}

    def test_they_are_those_of_the_callback(self, defined):
        for panel in of_kind(Curves):
            for name in panel.names:
                if name in OF_ALL_METHODS and panel.x == "trainer/global_step":
                    continue
                # Lightning draws what is not defined over trainer/global_step.
                assert panel.x == defined[True].get(name, "trainer/global_step"), name

    def test_other_methods_have_no_iterations(self, defined):
        assert "progress/iteration" not in defined[False].values()
        for section in panels():
            if section.title in ("Reward model", "Preference methods", "Loss"):
                assert {panel.x for panel in section.panels if isinstance(panel, Curves)} == {"trainer/global_step"}

    def test_golden(self):
        assert axis("frontier/reward", True) == "frontier/kl"
        assert axis("frontier/val_reward", True) == "frontier/val_kl"
        assert axis("rollout/reward/<name>", True) == "progress/iteration"
        assert (axis("val/kl", True), axis("val/kl", False)) == ("progress/iteration", "trainer/global_step")
        assert axis("policy/loss", True) == axis("val/agreement", True) == "trainer/global_step"

    def test_curves_share_one(self):
        with pytest.raises(ValueError, match="too many values to unpack"):
            curves("both", "rollout/reward", "policy/loss")

    def test_points_are_last_values(self):
        for panel in of_kind(Points):  # W&B keeps the best of these, not the last
            assert not {panel.x, panel.y} & SUMMARIES.keys()


def test_tables_take_the_whole_width():
    assert Section("s", [Table("t"), Media("m", ("n",))]).columns == 1
    assert Section("s", [Media("m", ("n",))]).columns == 3


# --- what W&B is told -------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers what W&B's library asks, and notes what is saved."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.saved: list[dict] = []
        self.entity: str | None = "me"
        self.projects = ["other", "lightning-rlhf"]
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, variables: dict) -> dict:
        """The data of a GraphQL response."""
        if "upsertView" in query:
            self.saved.append(variables)
            project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            known = {name: variables[name] for name in ("name", "type", "displayName", "description", "spec")}
            number = f"V{len(self.saved)}"
            view = {"id": number, "project": project, "updatedAt": "2026-01-01T00:00:00", **known}
            return {"upsertView": {"view": view, "inserted": True}}
        if "ProjectInternalId" in query:
            return {"project": {"id": "p", "internalId": "internal"}}
        if "GetProjects" in query:
            rest = {"isBenchmark": False, "createdAt": "2026-01-01T00:00:00", "user": None}
            nodes = [{"id": name, "name": name, "entityName": variables["entity"], **rest} for name in self.projects]
            page = {"endCursor": None, "hasNextPage": False}
            return {"models": {"pageInfo": page, "edges": [{"node": node} for node in nodes]}}
        viewer = {
            "id": "u",
            "entity": self.entity,
            "username": "me",
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"viewer": viewer}


class Handler(BaseHTTPRequestHandler):
    """One request to it."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/graphql":
            asked = json.loads(body)
            data = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        else:
            data = {}
        text = json.dumps(data).encode()
        self.send_response(401 if self.server.refuses else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


@pytest.fixture(scope="module", autouse=True)
def _one_service():
    """W&B's own process, which asks for the library, ends with these tests."""
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("WANDB_ENTITY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_APP_URL"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    settings = {"BASE_URL": server.url, "API_KEY": "k" * 40, "SILENT": "true", "ERROR_REPORTING": "false"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def saved_view(server) -> dict:
    make_workspace()
    (view,) = server.saved
    return view | {"spec": json.loads(view["spec"])}


def sections_of(view: dict) -> dict[str, dict]:
    return {section["name"]: section for section in view["spec"]["section"]["panelBankConfig"]["sections"]}


def panel_of(section: dict, title: str) -> dict:
    (panel,) = [panel for panel in section["panels"] if panel["config"].get("chartTitle") == title]
    return panel["config"] | {"kind": panel["viewType"]}


class TestView:
    def test_is_a_saved_view_of_the_project(self, saved_view):
        told = {name: saved_view[name] for name in ("entityName", "projectName", "type", "displayName")}
        assert told == {
            "entityName": "me",
            "projectName": "lightning-rlhf",
            "type": "project-view",
            "displayName": "lightning-rlhf",
        }

    def test_has_all_sections_and_the_first_is_open(self, saved_view):
        sections = sections_of(saved_view)
        assert list(sections) == TITLES
        assert [section["isOpen"] for section in sections.values()] == [True] + [False] * (len(TITLES) - 1)
        assert [len(s["panels"]) for s in sections.values()] == [len(section.panels) for section in panels()]

    def test_no_panel_is_on_a_second_page(self, saved_view):
        for section in sections_of(saved_view).values():
            layout = section["flowConfig"]
            assert layout["columnsPerPage"] * layout["rowsPerPage"] >= len(section["panels"])
        assert sections_of(saved_view)["Samples"]["flowConfig"]["columnsPerPage"] == 1

    def test_golden_panels(self, saved_view):
        sections = sections_of(saved_view)
        first = sections["Reward and KL"]
        assert panel_of(first, "Reward over KL") == {
            "kind": "Run History Line Plot",
            "chartTitle": "Reward over KL",
            "xAxis": "frontier/kl",
            "metrics": ["frontier/reward"],
        }
        assert panel_of(first, "Win rate, 95% interval") == {
            "kind": "Run History Line Plot",
            "chartTitle": "Win rate, 95% interval",
            "xAxis": "progress/iteration",
            "metrics": ["val/win_rate_low", "val/win_rate", "val/win_rate_high"],
            "yAxisMin": 0.0,
            "yAxisMax": 1.0,
        }
        points = panel_of(first, "Last reward and KL of each run")
        assert (points["kind"], points["xAxis"], points["yAxis"]) == (
            "Scatter Plot",
            "summary:rollout/kl",
            "summary:rollout/reward",
        )
        components = panel_of(first, "Components of the reward")
        assert (components["metrics"], components["metricRegex"]) == ([], "rollout/reward/.+")
        assert components["useMetricRegex"]
        assert panel_of(sections["Policy updates"], "Policy loss")["xAxis"] == "trainer/global_step"
        assert panel_of(sections["Reward model"], "Reliability") == {
            "kind": "Media Browser",
            "chartTitle": "Reliability",
            "mediaKeys": ["val/reliability", "val/reliability_levels"],
        }

    def test_tables_are_looked_up_in_the_summary(self, saved_view):
        tables = [p["config"] for p in sections_of(saved_view)["Samples"]["panels"] if p["viewType"] == "Weave"]
        sources = [table["panel2Config"]["exp"]["fromOp"] for table in tables]
        assert [source["inputs"]["key"]["val"] for source in sources] == ["samples/validation", "samples/rollouts"]
        assert {source["inputs"]["obj"]["fromOp"]["name"] for source in sources} == {"run-summary"}

    def test_curves_are_not_smoothed(self, saved_view):
        settings = [s["localPanelSettings"] for s in sections_of(saved_view).values()]
        assert {setting["smoothingType"] for setting in [*settings, saved_view["spec"]["section"]["settings"]]} == {
            "none"
        }


class TestReport:
    @pytest.fixture
    def blocks(self, server) -> list[dict]:
        make_workspace("other", report=True)
        view, report = server.saved
        told = [(one["entityName"], one["projectName"], one["type"]) for one in (view, report)]
        assert told == [("me", "other", "project-view"), ("me", "other", "runs")]
        return json.loads(report["spec"])["blocks"]

    def test_has_the_panels_of_the_view_under_headings(self, blocks, server):
        headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
        assert headings == TITLES
        grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
        sections = sections_of({"spec": json.loads(server.saved[0]["spec"])}).values()
        for grid, section in zip(grids, sections, strict=True):
            here = grid["panelBankSectionConfig"]["panels"]
            assert [panel["config"] for panel in here] == [panel["config"] for panel in section["panels"]]

    def test_shows_the_runs_of_the_project(self, blocks):
        for block in blocks:
            if block["type"] == "panel-grid":
                (runs,) = block["metadata"]["runSets"]
                assert (runs["project"]["name"], runs["project"]["entityName"]) == ("other", "me")

    def test_panels_lie_side_by_side_on_the_page(self, blocks):
        for block in blocks:
            taken = set()
            panels = block["metadata"]["panelBankSectionConfig"]["panels"] if block["type"] == "panel-grid" else []
            layouts = [panel["layout"] for panel in panels]
            assert layouts == sorted(layouts, key=lambda layout: (layout["y"], layout["x"]))
            for layout in layouts:
                columns, rows = (range(layout[at], layout[at] + layout[size]) for at, size in (("x", "w"), ("y", "h")))
                cells = {(x, y) for x in columns for y in rows}
                assert max(columns) < 24
                assert not cells & taken
                taken |= cells
            wide = len({x for x, _ in taken})
            assert wide in (0, 24)


class TestCommand:
    def test_gives_the_address(self, server):
        (url,) = make_workspace()
        name = server.saved[0]["name"].removeprefix("nw-").removesuffix("-v")
        assert url == f"{server.url}/me/lightning-rlhf?nw={name}"

    def test_gives_the_addresses_of_both(self, server):
        _, url = make_workspace(report=True)
        assert url == f"{server.url}/me/lightning-rlhf/reports/lightning-rlhf--V2"

    def test_the_entity_that_is_given_wins(self, server, monkeypatch):
        make_workspace(entity="team")
        monkeypatch.setenv("WANDB_ENTITY", "from-environment")
        make_workspace()
        make_workspace(entity="team")
        assert [view["entityName"] for view in server.saved] == ["team", "from-environment", "team"]

    def test_makes_a_new_view_each_time(self, server):
        make_workspace()
        make_workspace()
        first, second = server.saved
        assert first["name"] != second["name"]
        assert "id" not in second


class TestErrors:
    @pytest.fixture(autouse=True)
    def _nothing_saved(self, server):
        yield
        assert server.saved == []

    def test_package_is_missing(self, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
        with pytest.raises(ValueError, match=r"pip install 'lightning-rlhf\[workspace\]'"):
            make_workspace()

    @pytest.mark.parametrize("mode", ["offline", "disabled"])
    def test_offline(self, monkeypatch, mode):
        monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(ValueError, match=f"WANDB_MODE is {mode}.*wandb sync"):
            make_workspace()

    def test_no_credentials(self, monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setattr("sys.stdin", io.StringIO())  # a person at a terminal would be asked for them
        with pytest.raises(ValueError, match=r"W&B could not be used: No API key.*wandb login"):
            make_workspace()

    def test_wrong_credentials(self, server):
        server.refuses = True
        with pytest.raises(ValueError, match=r"W&B could not be used: .*credentials"):
            make_workspace()

    def test_server_is_down(self, monkeypatch):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
            monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
            with pytest.raises(ValueError, match=r"W&B could not be used: .*127\.0\.0\.1"):
                make_workspace()

    def test_no_such_project(self, server):
        expected = "`project` must be a project of me, which has lightning-rlhf, other, but got 'lightning-rhlf'"
        with pytest.raises(ValueError, match=expected):
            make_workspace("lightning-rhlf")
        server.projects = []
        with pytest.raises(ValueError, match="which has nothing yet"):
            make_workspace()

    def test_no_default_entity(self, server):
        server.entity = None
        with pytest.raises(ValueError, match="`entity`: your W&B account has no default one"):
            make_workspace()
