"""The report of a load test: points as CSV and JSON, figures, and one HTML page with everything."""

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from loadtest.figures import draw_latency, draw_throughput
from loadtest.points import KNEE, STAGES, Phase, Point, knee, knees


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """Write a point a line; what holds several numbers is JSON."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Point)])
        writer.writeheader()
        for point in points:
            writer.writerow(
                {name: json.dumps(value) if isinstance(value, dict) else value for name, value in asdict(point).items()}
            )


def write_json(path: Path, facts: Mapping[str, Any], points: Sequence[Point]) -> None:
    """Write everything; NaN becomes null."""
    document = {**facts, "knee": {"definition": knee.__doc__, "curves": knees(points)}}
    document["points"] = [asdict(point) for point in points]
    path.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 4)
    return value


_PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>bertqa: load test of {{ facts.date }}</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: 1rem 0 }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right } th { border-color: #888 }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dd { margin: 0 }
.wide { overflow-x: auto } .bad { background: #fdd }
</style></head><body>
<h1>Load test</h1>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for alt, data in figures.items() %}<p><img alt="{{ alt }}" src="data:image/png;base64,{{ data }}"></p>{% endfor %}
{% for name, rows in tables.items() %}<h2>{{ name }}</h2><div class="wide"><table>
<tr>{% for column in rows[0] %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row.get("wrong") or row.get("error") %} class="bad"{% endif %}>\
{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
<h2>Outcomes</h2><table><tr><th>outcome</th><th>requests</th></tr>
{% for outcome, count in outcomes %}<tr><td>{{ outcome }}</td><td>{{ count }}</td></tr>{% endfor %}</table>
<h2>Words</h2><p>{{ words }}</p>
</body></html>
""")
_WORDS = (
    f"Knee: the fewest clients whose throughput is at least {KNEE:.0%} of the curve's peak. Latency: of right answers, "
    "from the moment when a request was due, which in the closed loop is when it was sent. Right: the very answer that "
    "an undisturbed service gave to one client, and a piece of its text. Shed: 429 or 503 with retry-after. Wrong: a "
    "reply of status 200 that is not right. Error: all else. CPU: for each right answer, of all processes of a role. "
    "Queue and engine are Triton's own account; the service's line is what is left of its infer time, gRPC included."
)
_TABLES: Mapping[str, tuple[Phase, tuple[str, ...]]] = {
    "Closed loop": ("closed", ("replicas", "instances", "clients")),
    "Fixed rate": ("open", ("share", "rate", "late_p99_ms")),
    "Other questions": ("workload", ("mix", "repeat", "clients", "windows")),
    "Scaling with an engine that sleeps": ("scaling", ("replicas", "tritons", "instances", "clients")),
}
_COLUMNS: tuple[str, ...] = (
    "throughput",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "max_ms",
    "right",
    "shed",
    "wrong",
    "error",
    *STAGES,
)
_COLUMNS += tuple(f"cpu_{role}_ms" for role in ("service", "triton", "haproxy", "clients"))
_COLUMNS += ("memory_service_mib", "memory_triton_mib")


def table(points: Sequence[Point], columns: Sequence[str]) -> list[dict[str, str | int]]:
    """Rows with numbers as people read them; empty where there is none."""
    return [{column: _cell(getattr(point, column)) for column in columns} for point in points]


def _cell(value: Any) -> str | int:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return value if isinstance(value, int) else str(value)


def write_report(directory: Path, facts: Mapping[str, Any], points: Sequence[Point]) -> None:
    """Write points.csv, points.json, throughput.png, latency.png and report.html.

    Args:
        directory: for the files; those that are there are replaced.
        facts: machine, engine, versions, commands; one line each on the page.
        points: in the order of the tables.
    """
    write_csv(directory / "points.csv", points)
    write_json(directory / "points.json", facts, points)
    figures = {}
    if any(point.phase == "closed" for point in points):
        for name, draw in (("throughput", draw_throughput), ("latency", draw_latency)):
            image = io.BytesIO()
            draw(points, str(facts["title"])).savefig(image, format="png", dpi=130)
            (directory / f"{name}.png").write_bytes(image.getvalue())
            figures[f"{name} against clients"] = base64.b64encode(image.getvalue()).decode()
    tables: dict[str, list[dict[str, str | int]]] = {
        "Knees": [{name: _cell(value) for name, value in row.items()} for row in knees(points)]
    }
    for title, (phase, own) in _TABLES.items():
        tables[title] = table([each for each in points if each.phase == phase], own + _COLUMNS)
    outcomes: Counter[str] = Counter()
    for point in points:
        outcomes.update(point.outcomes)
    page = _PAGE.render(
        facts=facts,
        figures=figures,
        tables={title: rows for title, rows in tables.items() if rows},
        outcomes=outcomes.most_common(),
        words=_WORDS,
    )
    (directory / "report.html").write_text(page)
