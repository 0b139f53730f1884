"""The class as one HTML page, offline: scores, exercises, common misconceptions, each student."""

import html
import io
from collections import Counter
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autograder.classroom.gradebook import Gradebook, Row, write_whole
from autograder.results import PASSED

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:1rem 0}figure svg{max-width:100%;height:auto}
.scroll{overflow-x:auto}details{margin:.3rem 0}summary{cursor:pointer}
.bar{display:inline-block;height:.7rem;background:#0072b2}
.note{background:#fff4e0;padding:.5rem 1rem;border-left:4px solid #e69f00}
"""


def write_report(book: Gradebook, out: Path) -> Path:
    """Write report.html; no script, no request, nothing of a student's but as escaped text."""
    parts = [
        "<h1>Class report</h1>",
        f"<p>{len(book.students)} students, {len(book.rows)} submissions, "
        f"{len(book.chapters)} chapters.</p>",
        _attention(book), _scores(book), _exercises(book), _misconceptions(book), _students(book),
    ]  # fmt: skip
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>Class report</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    return write_whole(out / "report.html", page)


def _attention(book: Gradebook) -> str:
    notes = [f"{_e(r.student)}: {_e(r.chapter)} {_e(r.problem)}" for r in book.rows if r.problem]
    notes += [
        f"{_e(r.student)}: {r.unverified:g} points of {_e(r.chapter)} rest on measurements that "
        "the file could have changed; grade them by hand"
        for r in book.rows if r.unverified
    ]  # fmt: skip
    notes += [
        f"{_e(chapter)}: the same file from {', '.join(map(_e, students))}"
        for chapter, *students in book.copies()
    ]
    if not notes:
        return ""
    items = "".join(f"<li>{note}</li>" for note in notes[:200])
    more = f"<p>and {len(notes) - 200} more</p>" if len(notes) > 200 else ""
    return f"<h2>To look at</h2><ul class='note'>{items}</ul>{more}"


def _scores(book: Gradebook) -> str:
    figures = "".join(_histogram(book, chapter) for chapter in book.chapters)
    head = "<tr><th>chapter</th><th class='n'>handed in</th><th class='n'>mean</th>" \
           "<th class='n'>median</th><th class='n'>full marks</th></tr>"  # fmt: skip
    lines = []
    for chapter in book.chapters:
        scores = sorted(_shares(book, chapter))
        middle = (scores[(len(scores) - 1) // 2] + scores[len(scores) // 2]) / 2
        full = sum(s >= 1 for s in scores)
        lines.append(
            f"<tr><td>{_e(chapter)}</td><td class='n'>{len(scores)}</td>"
            f"<td class='n'>{sum(scores) / len(scores):.0%}</td><td class='n'>{middle:.0%}</td>"
            f"<td class='n'>{full}</td></tr>"
        )
    return f"<h2>Scores</h2><table>{head}{''.join(lines)}</table>{figures}"


def _shares(book: Gradebook, chapter: str) -> list[float]:
    whole = book.points[chapter] or 1.0
    return [row.earned / whole for row in book.rows if row.chapter == chapter]


def _histogram(book: Gradebook, chapter: str) -> str:
    with matplotlib.rc_context({"font.size": 13}):
        figure = _figure(8, 2.6)
        axes = figure.subplots()
        shares = [100 * s for s in _shares(book, chapter)]
        axes.hist(shares, bins=[10 * i for i in range(11)], color="#0072b2", edgecolor="white")
        axes.set(xlabel="score (%)", ylabel="students", title=chapter, xlim=(0, 100))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        return _svg(figure)


def _exercises(book: Gradebook) -> str:
    head = "<tr><th>exercise</th><th>solved</th><th class='n'>share</th><th>often</th></tr>"
    lines = []
    for chapter in book.chapters:
        results = [r for row in book.rows if row.chapter == chapter for r in row.results]
        for name in dict.fromkeys(r.exercise for r in results):
            mine = [r for r in results if r.exercise == name]
            solved = sum(r.status == PASSED for r in mine) / len(mine)
            other = Counter(r.status for r in mine if r.status != PASSED).most_common(1)
            often = f"{other[0][0]} ({other[0][1]})" if other else ""
            lines.append(
                f"<tr><td>{_e(chapter)}.{_e(name)}</td>"
                f"<td><span class='bar' style='width:{8 * solved:.2f}rem'></span></td>"
                f"<td class='n'>{solved:.0%}</td><td>{_e(often)}</td></tr>"
            )
    return f"<h2>Exercises</h2><table>{head}{''.join(lines)}</table>"


def _misconceptions(book: Gradebook) -> str:
    found: Counter[tuple[str, str, str, str]] = Counter()
    for row in book.rows:
        for r in row.results:
            if r.diagnosis and not r.diagnosis.is_starter:
                found[r.exercise, r.diagnosis.name, r.diagnosis.says, r.diagnosis.see] += 1
    if not found:
        return ""
    common = found.most_common(12)
    with matplotlib.rc_context({"font.size": 13}):
        figure = _figure(9, 1.2 + 0.42 * len(common))
        axes = figure.subplots()
        labels = [f"{exercise}: {name}"[:60] for (exercise, name, _, _), _ in common]
        bars = axes.barh(range(len(common)), [n for _, n in common], color="#d55e00")
        axes.bar_label(bars, padding=3)
        axes.set_yticks(range(len(common)), labels)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="students")
        axes.spines[["top", "right"]].set_visible(False)
        plot = _svg(figure)
    lines = "".join(
        f"<tr><td>{_e(exercise)}</td><td>{_e(name)}</td><td class='n'>{count}</td>"
        f"<td>{_e(says)} <em>{_e(see)}</em></td></tr>"
        for (exercise, name, says, see), count in found.most_common(40)
    )
    head = "<tr><th>exercise</th><th>misconception</th><th class='n'>students</th><th></th></tr>"
    return f"<h2>Common misconceptions</h2>{plot}<table>{head}{lines}</table>"


def _students(book: Gradebook) -> str:
    parts = ["<h2>Students</h2>"]
    for student in book.students:
        rows = book.of_student[student]
        total = sum(row.earned for row in rows)
        inner = "".join(_student_chapter(row) for row in rows)
        parts.append(
            f"<details><summary>{_e(student)}: {total:g} points</summary>{inner}</details>"
        )
    return "".join(parts)


def _student_chapter(row: Row) -> str:
    if row.problem:
        return f"<p>{_e(row.chapter)} {_e(row.problem)}</p>"
    lines = []
    for r in row.results:
        said = r.diagnosis.says if r.diagnosis else ""
        message = said or next((m for _, m in r.told() if m), "")
        lines.append(
            f"<tr><td>{_e(r.exercise)}</td><td class='n'>{r.earned:g} / {r.points:g}</td>"
            f"<td>{_e(r.status)}</td><td>{_e(message[:400])}</td></tr>"
        )
    return f"<h3>{_e(row.chapter)}</h3><div class='scroll'><table>{''.join(lines)}</table></div>"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "class", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return f"<figure>{drawn[drawn.index('<svg') :]}</figure>"


def _e(text: str) -> str:
    return html.escape(str(text))
