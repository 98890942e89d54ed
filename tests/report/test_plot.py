import re

from lpdeploy.plotting import COLORS, INK, make_panels, to_svg
from lpdeploy.report.plot import Point, draw_scatter, embed


def test_a_picture_takes_the_colours_of_the_page():
    figure, (panel,) = make_panels(1)
    panel.plot([0, 1], [0, 1], color=COLORS[0], label="<a & b>")
    panel.set_title("t", color=INK)
    panel.legend()
    picture = embed(to_svg(figure), title="Title", label='say "a" & <b>', name="one")
    assert picture.title == "Title"
    assert picture.svg.startswith('<svg role="img" aria-label="say &quot;a&quot; &amp; &lt;b&gt;"')
    for color in (COLORS[0], INK, "#000000", "#ffffff"):
        assert f"{color};" not in picture.svg
    assert "var(--series-0)" in picture.svg
    assert "&lt;a &amp; b&gt;" in picture.svg
    ids = re.findall(r'\bid="([^"]*)"', picture.svg)
    assert ids
    assert all(name.startswith("one-") for name in ids)
    for used in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', picture.svg):
        assert "".join(used) in ids


def test_a_scatter_labels_its_points_beside_them():
    points = [Point(1, 2, "a$b$"), Point(1, 2, "again", strong=False), Point(9, 5, "far")]
    svg = draw_scatter(points, x="MB", y="perplexity on $x$", line=points[::2])
    for text in ("a$b$", "again", "far", "MB", "perplexity on $x$"):
        assert f">{text}</text>" in svg
