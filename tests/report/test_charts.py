import math
import re
import xml.etree.ElementTree as ET

import pytest

from lightning_rlhf.report import charts
from lightning_rlhf.report.charts import Line

LINES = [Line("first", [0.0, 1.0, 2.0], [1.0, 3.0, 2.0]), Line("second", [0.0, 2.0], [2.0, 2.5], points=True)]
DRAWN = {
    "curves": lambda: charts.curves("curves", LINES, "iteration"),
    "band": lambda: charts.curves("band", [Line("mean", [0, 1], [1, 2], False, [0, 1], [2, 3], colour=3)], "step"),
    "frontier": lambda: charts.frontier("frontier", [0.0, 1.0], [2.0, 3.0], [0.0, 1.0], ("KL", "reward")),
    "clouds": lambda: charts.clouds("clouds", LINES, ("KL", "reward")),
    "histogram": lambda: charts.histogram("histogram", [("before", [0.0, 1.0]), ("after", [1.0, math.nan])], "reward"),
    "stacked": lambda: charts.stacked("stacked", [0.0, 1.0], [("a", [1.0, 2.0]), ("other, 2%", [1.0, 1.0])], "x", "s"),
    "bars": lambda: charts.stacked("bars", [0.0], [("a", [1.0]), ("b", [2.0])], "x", "s"),
    "reliability": lambda: charts.reliability("reliability", [0.1, 0.9], [0.2, 0.8], [5.0, 0.0]),
    "nothing but NaN": lambda: charts.curves("nan", [Line("nan", [0.0, 1.0], [math.nan, math.nan])], "step"),
    "one point": lambda: charts.curves("one", [Line("one", [3.0], [1.0])], "step"),
}


@pytest.fixture(params=DRAWN, scope="module")
def svg(request):
    return DRAWN[request.param]()


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]


def test_is_whole_and_scales(svg):
    root = ET.fromstring(svg)
    assert root.get("viewBox")
    assert not {"width", "height"} & set(root.attrib)  # the page decides
    assert any(text for text in texts(svg))  # text is text, not outlines


def test_all_colours_follow_the_theme(svg):
    assert "var(--" in svg
    assert not re.findall(r"#[0-9a-f]{6}", svg)
    assert not re.findall(r"(?:fill|stroke): (?:black|white)", svg)


def test_same_data_same_text():
    assert DRAWN["stacked"]() == DRAWN["stacked"]()


def test_ids_are_its_own_and_used(svg):
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert set(ids) == set(re.findall(r'(?:url\(#|href="#)([\w-]+)', svg))


def test_two_charts_share_no_id():
    first, second = DRAWN["curves"](), charts.curves("another title", LINES, "iteration")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_labels_stand_as_they_are():
    lines = [Line("a <b> & $x_1$", [0.0], [1.0]), Line("plain", [0.0], [2.0])]
    svg = charts.curves('the "title" & <i>', lines, "step $\\frac$")
    assert {"a <b> & $x_1$", "plain", "step $\\frac$"} <= set(texts(svg))
    assert ET.fromstring(svg).get("aria-label") == 'the "title" & <i>'


def test_legend_only_where_there_is_a_choice():
    assert "first" not in texts(charts.curves("one", LINES[:1], "x"))
    assert {"first", "second"} <= set(texts(charts.curves("two", LINES, "x")))
    assert "first" in texts(charts.curves("group", [LINES[0]._replace(colour=0)], "x"))


def test_colour_is_the_place_or_the_given_number():
    assert "--series-1" not in charts.curves("x", LINES[:1], "x")
    assert "--series-1" in charts.curves("x", LINES, "x")
    assert "--series-4" in charts.curves("x", [LINES[0]._replace(colour=4)], "x")
    assert "stroke-dasharray" in charts.curves("x", [LINES[0]._replace(colour=6)], "x")  # colour 0 again, dashed


def test_means_stand_in_the_legend():
    svg = charts.histogram("x", [("before", [0.0, 1.0]), ("after", [1.0, 2.0, 6.0])], "reward")
    assert {"before, mean 0.5", "after, mean 3"} <= set(texts(svg))


def test_long_curves_are_thinned_to_means_with_a_band():
    # 600 values in 300 pairs: (0, 1), (2, 3), ...
    line = charts.thinned(Line("long", list(map(float, range(600))), list(map(float, range(600)))))
    assert len(line.x) == 300
    assert (line.x[1], line.y[1], line.low[1], line.high[1]) == (2.5, 2.5, 2.0, 3.0)
    assert charts.thinned(LINES[0]) is LINES[0]


def test_thinning_leaves_out_parts_that_are_all_nan():
    y = [math.nan, math.nan, *([1.0] * 598)]
    line = charts.thinned(Line("long", list(map(float, range(600))), y))
    assert len(line.x) == 299
    assert charts.thinned(Line("nan", list(map(float, range(600))), [math.nan] * 600)).x == []
