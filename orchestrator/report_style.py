"""How pages look, and what they are made of: one document of figures, tables and folded details.

Light and dark by the reader's preference, in colours that colour-blind readers tell apart.
Lines and buckets use the Okabe-Ito palette (Nature Methods 8, 441), expert load a blue-neutral-orange scale.
"""

import re
from html import escape

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --ink: #1c1e21; --soft: #5d646d; --rule: #e3e5e8;
  --c0: #0072b2; --c1: #d55e00; --c2: #8a5a9e; --c3: #009e73; --c4: #b8860b; --c5: #56b4e9;
  --c6: #cc79a7; --c7: #9aa1a9;
  --b0: #0072b2; --b1: #56b4e9; --b2: #e69f00; --b3: #f0d95c; --b4: #009e73; --b5: #d55e00;
  --b6: #cc79a7; --b7: #c3c8ce; --b8: #8a5a9e; --on-b7: #1c1e21;
  --h0: #08519c; --h1: #4292c6; --h2: #9ecae1; --h3: #d6e6f2; --h4: #f1f1ef; --h5: #fde0c1; --h6: #fdae6b;
  --h7: #e6550d; --h8: #8f2d04; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --card: #1b1e23; --ink: #e6e8eb; --soft: #99a1ab;
  --rule: #2d3239; --c0: #58aee8; --c1: #ff8c42; --c2: #c79be0; --c3: #3ccba0; --c4: #e0b84c; --c5: #9ad4f5;
  --c6: #e7a3c6; --c7: #6d757f; --b0: #2f8fd0; --b7: #565d66; --on-b7: #fff;
  --h0: #8cc4f2; --h1: #4f94cd; --h2: #356a97; --h3: #2a4359; --h4: #2c2f34; --h5: #55402c; --h6: #9a6227;
  --h7: #e0812c; --h8: #ffc58a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 56px; }
h1 { font-size: 27px; font-weight: 650; letter-spacing: -0.01em; margin: 0 0 6px; }
h2 { font-size: 16px; font-weight: 650; margin: 0; }
p { margin: 0; } small { display: block; color: var(--soft); font-size: 12.5px; line-height: 1.35; }
.sub { color: var(--soft); margin-bottom: 4px; } .sub b { color: var(--ink); }
.status { display: inline-block; padding: 1px 9px; border-radius: 10px; font-size: 13px; margin-right: 6px;
  border: 1px solid currentColor; color: var(--soft); }
.status.completed { color: var(--c3); } .status.failed { color: var(--c1); }
.status.budget, .status.preempted { color: var(--c4); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 24px 0; background: var(--rule);
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.tiles div { background: var(--card); padding: 14px 16px 12px; }
.tiles dt { color: var(--soft); font-size: 13px; } .tiles dd { margin: 2px 0 3px; font-size: 25px; font-weight: 620;
  font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin-bottom: 16px; }
figure, details { margin: 0 0 16px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 16px 18px; }
.grid > :only-child { grid-column: 1 / -1; }
.grid figure { margin: 0; display: flex; flex-direction: column; } .grid svg { margin-top: auto; }
figcaption { margin-bottom: 10px; } figcaption p { color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: inherit; fill: var(--soft); } .tick { font-size: 11px; font-variant-numeric: tabular-nums; }
.axis { font-size: 11.5px; } line.grid { stroke: var(--rule); } line.base, line.mark { stroke: var(--soft); }
line.level { stroke: var(--soft); stroke-dasharray: 2 3; } .level-label { font-size: 11.5px; }
path.line { fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
path.faint { stroke-width: 1; opacity: .32; } path.dashed { stroke-dasharray: 6 4; stroke-width: 1.7; }
path.thin { stroke-width: 1.2; opacity: .7; } circle.hit { opacity: 0; } circle.hit:hover { opacity: .45; }
circle.dot { stroke: var(--card); stroke-width: 1; } .inbar { font-size: 13px; fill: #fff; font-weight: 600; }
.b1 + .inbar, .b2 + .inbar, .b3 + .inbar { fill: #1c1e21; } .b7 + .inbar { fill: var(--on-b7); }
.bar-label { font-size: 13px; color: var(--soft); margin: 8px 0 3px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 3px 16px; margin: 8px 0 0; padding: 0;
  font-size: 12.5px; color: var(--soft); }
.key { display: inline-block; width: 18px; height: 0; border-top: 2.5px solid var(--k); margin-right: 7px;
  vertical-align: middle; }
.key.dashed { border-top-style: dashed; } .key.faint { opacity: .5; border-top-width: 1.5px; }
.key.points { width: 8px; height: 8px; border: 0; border-radius: 50%; background: var(--k); }
.key.box { width: 12px; height: 12px; border: 1px solid var(--rule); border-radius: 2px; background: var(--k); }
.named { white-space: nowrap; } .scroll { overflow-x: auto; } figure .scroll { margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; } th.n, td.n { text-align: right; padding: 6px 0 6px 14px; }
table.compare { background: var(--card); border: 1px solid var(--rule); margin: 24px 0; }
.compare th, .compare td { padding: 8px 14px !important; } .compare td.n { font-size: 16px; font-weight: 600; }
.compare small { font-weight: 400; } .compare th { color: var(--ink); }
summary { cursor: pointer; font-weight: 650; font-size: 16px; } details[open] summary { margin-bottom: 10px; }
pre { margin: 0; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; }
code { font: 0.93em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.none { color: var(--soft); padding: 24px 0; } footer { color: var(--soft); font-size: 13px; margin-top: 24px; }
footer p { margin-bottom: 4px; }
@media (max-width: 800px) { .grid { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: 1fr 1fr; }
  .pan { overflow-x: auto; } .pan > svg { min-width: 760px; } .pan > .legend,
  .pan > .bar-label { position: sticky; left: 0; }
  .whole .inbar { display: none; } }
@media (max-width: 480px) { main { padding: 24px 14px 40px; } .tiles { grid-template-columns: 1fr; } }
@media print { main { max-width: none; padding: 0; } figure, details { break-inside: avoid; } }
""" + "".join(f".c{i} {{ stroke: var(--c{i}); --k: var(--c{i}); }} .dot.c{i}, .hit.c{i} {{ fill: var(--c{i}); }} "
              f".b{i} {{ fill: var(--b{i}); --k: var(--b{i}); }}\n" for i in range(9)) + "".join(
    f".h{i} {{ fill: var(--h{i}); --k: var(--h{i}); }}\n" for i in range(9))


def document(title: str, body: list[str], *, style: str = "") -> str:
    """A whole file that asks the network for nothing. body: HTML, empty parts are left out. style: beside `STYLE`."""
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
            "</head>\n<body><main>\n" + "\n".join(part for part in body if part) + "\n</main></body></html>\n")


def figure(title: str, subtitle: str, body: str, *, wide: bool = False) -> str:
    """A wide one is scrolled where a screen is narrow, but for what is in a `div` of class `whole`."""
    body = f'<div class="pan">{body}</div>' if wide else body
    return f"<figure><figcaption><h2>{escape(title)}</h2><p>{marked(subtitle)}</p></figcaption>{body}</figure>"


def marked(text: str) -> str:
    """As HTML, with what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def details(title: str, body: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{marked(title)}</summary>{body}</details>"


def table(head: list[str], rows: list[list[str]], *, numeric_from: int = 1, css: str = "") -> str:
    """Cells are HTML already; columns from `numeric_from` on are right-aligned."""
    def cell(tag: str, i: int, content: str) -> str:
        return f"<{tag}{' class=n' if i >= numeric_from else ''}>{content}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, text) for i, text in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows]
    return f'<div class="scroll"><table class="{css}">{"".join(lines)}</table></div>'
