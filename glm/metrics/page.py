"""The pieces of the report page: plain HTML, one style block, nothing loaded from anywhere."""

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root {
  color-scheme: light dark;
  --back: #fbfbfa; --card: #ffffff; --text: #1d2129; --soft: #667085; --line: #e3e5ea; --accent: #2563eb;
}
@media (prefers-color-scheme: dark) {
  :root { --back: #14161a; --card: #1c1f25; --text: #e6e8ec; --soft: #98a1b0; --line: #2f343d; --accent: #7aa2ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 75ch; } .soft, figcaption, th { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.card, .wide, figure, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .6rem .9rem; min-width: 8.5rem; flex: 1 1 8.5rem; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } th { font-weight: 500; } .word { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: .8rem; margin: .8rem 0; }
figure { margin: 0; padding: .6rem .6rem .5rem; }
figure.full { grid-column: 1 / -1; } figure svg { width: 100%; height: auto; display: block; color: var(--text); }
figcaption { font-size: .85rem; padding: 0 .3rem; }
details { margin: .5rem 0; padding: .5rem .9rem; }
summary { cursor: pointer; } pre { overflow-x: auto; font: .82rem/1.45 ui-monospace, monospace; margin: .5rem 0; }
.say { border-left: 3px solid var(--line); padding: .3rem .7rem; margin: .4rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.say.reply { border-color: var(--accent); } .dialogue { border-bottom: 1px solid var(--line); padding: .5rem 0; }
.dialogue:last-child { border-bottom: 0; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
"""


class Raw(str):
    """Markup that is not escaped again."""


def text(value: object) -> str:
    """``value`` escaped, unless it is markup already."""
    return value if isinstance(value, Raw) else escape(str(value))


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> Raw:
    return Raw(f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>")


def heading(title: str) -> Raw:
    return Raw(f"<h3>{escape(title)}</h3>")


def sentence(words: str) -> Raw:
    return Raw(f'<p class="soft">{text(words)}</p>')


def cards(facts: Sequence[tuple[str, object]]) -> Raw:
    """(name, value) pairs as a row of cards."""
    return Raw('<div class="cards">' + "".join(
        f'<div class="card"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in facts) + "</div>")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> Raw:
    """The first ``words`` columns are text, the others numbers; scrolls sideways on a narrow screen."""
    def line(cells: Sequence[object], tag: str) -> str:
        opening = [f"<{tag} class=word>" if index < words else f"<{tag}>" for index in range(len(cells))]
        return "<tr>" + "".join(f"{start}{text(cell)}</{tag}>" for start, cell in zip(opening, cells, strict=True)) + "</tr>\n"

    head, body = line(headers, "th"), "".join(line(row, "td") for row in rows)
    return Raw(f'<div class="wide"><table><thead>{head}</thead><tbody>\n{body}</tbody></table></div>')


def figure(svg: str, caption: str, full: bool = False) -> Raw:
    return Raw(f'<figure{" class=full" if full else ""}>{svg}<figcaption>{text(caption)}</figcaption></figure>')


def figures(items: Sequence[str]) -> Raw:
    """Figures side by side where the screen is wide enough."""
    return Raw('<div class="figures">' + "\n".join(items) + "</div>")


def folded(title: object, *parts: str, opened: bool = False) -> Raw:
    return Raw(f'<details{" open" if opened else ""}><summary>{text(title)}</summary>' + "".join(parts) + "</details>")


def code(content: str) -> Raw:
    return Raw(f"<pre>{escape(content)}</pre>")


def dialogue(prompt: str, reply: str, remark: str) -> Raw:
    return Raw(f'<div class="dialogue"><div class="say">{escape(prompt)}</div><div class="say reply">{escape(reply)}</div>'
               f'<span class="soft">{escape(remark)}</span></div>')


def dot(color: str) -> Raw:
    """A coloured mark, the legend of the curves."""
    return Raw(f'<span class="dot" style="background:{color}"></span>')
