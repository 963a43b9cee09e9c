"""The parts that our HTML pages are made of: style, sections, tables, figures.

A page asks for nothing from elsewhere; it reads well in light, dark and print.
"""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 160  # pixels of a shown image's longer side

# Kinds of operation: arithmetic in blues and greens, what waits for memory in warm colours, the rest in greys.
KIND_COLOURS = (
    "#1f5f8b #2a789f #157a6e #2b8069 #96700f #a05f16 #b4541a #9c3f3f #75628a #666c73 #c3c6c9",
    "#4d9fd6 #2f7fb0 #2fa797 #6cc5ae #d3a944 #cf8f45 #e0854f #d9736f #a08fb6 #858c94 #5d646b",
)

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf7;--fg:#1d2126;--muted:#5a636d;--rule:#dcd9d2;--panel:#f2f0ea;
--s0:#1f5f8b;--s1:#b4541a;--good:#1b7043;--bad:#b3261e;--on:#ffffff;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--muted:#9aa4ae;--rule:#32383f;--panel:#1d2226;
--s0:#6cb2e6;--s1:#f0a36b;--good:#62c78f;--bad:#ff8f85;--on:#0d1013;DARK}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:44px 24px 72px}
h1,h2{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua",Georgia,serif;font-weight:600;
line-height:1.2;text-wrap:balance}
h1{font-size:36px;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:24px;margin:0 0 6px}
header{display:flex;gap:18px;align-items:flex-start}
header svg{width:46px;flex:none;margin-top:4px}
header p{margin:6px 0 0;color:var(--muted)}
nav{margin:26px 0 0;padding:9px 0;border-block:1px solid var(--rule);display:flex;flex-wrap:wrap;gap:4px 18px;
font-size:13.5px}
a{color:var(--s0);text-decoration:none}a:hover{text-decoration:underline}
a:focus-visible,summary:focus-visible{outline:2px solid var(--s0);outline-offset:3px}
section{margin-top:52px}
.lead{margin:0 0 18px;max-width:46em}
.note,.missing{color:var(--muted);font-size:14px;max-width:54em}.muted{color:var(--muted)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:26px 30px;margin:34px 0 0}
.cards div{display:flex;flex-direction:column;border-top:2px solid var(--fg);padding-top:10px}
.cards dd{margin:0;font-size:31px;line-height:1.15;letter-spacing:-.015em;font-weight:600}
.cards dt{font-weight:600;margin-top:3px}.cards p{margin:2px 0 0;font-size:13.5px;line-height:1.4;color:var(--muted)}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:22px 28px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:30px 40px;align-items:start}
.two>*{min-width:0}
figure{margin:0}figcaption{font-size:14px;font-weight:600;margin-bottom:4px;display:flex;justify-content:space-between;
flex-wrap:wrap;gap:0 12px}
.key{font-weight:400;display:inline-flex;gap:14px;color:var(--muted)}.key i{display:inline-block;width:14px;height:3px;
border-radius:2px;margin-right:6px;vertical-align:middle;background:var(--c)}
svg{width:100%;height:auto;display:block;overflow:visible}
svg text{font-family:inherit;fill:var(--fg)}
.tick{font-size:11px;fill:var(--muted)!important}.name{font-size:11.5px}.count{font-size:11.5px}
.count.on{fill:var(--on)!important}
.grid{stroke:var(--rule);stroke-width:1}.mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}.dot{fill:var(--c)}
.ideal{stroke:var(--muted);stroke-dasharray:4 4;fill:none}.bar{fill:var(--s0)}
.hit{fill:transparent}.hit:hover{fill:var(--fg);fill-opacity:.06}
.cell.right{fill:var(--s0)}.cell.wrong{fill:var(--s1)}.cell:hover{stroke:var(--fg);stroke-width:1.5}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px}
th,td{padding:5px 0 5px 18px;text-align:right;border-bottom:1px solid var(--rule);font-weight:400;white-space:nowrap}
thead th{color:var(--muted);font-size:13px;vertical-align:bottom}
th:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere}
.compact{width:auto;min-width:340px}
.plain td{text-align:left;white-space:normal;overflow-wrap:anywhere}.plain th:first-child{color:var(--muted);width:12em}
.meter{display:inline-block;min-width:84px;padding-bottom:3px;background:linear-gradient(to right,var(--s0) var(--v),
var(--rule) var(--v)) bottom/100% 3px no-repeat}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:18px 14px}
.tile img{width:100%;max-width:120px;height:auto;aspect-ratio:1;object-fit:contain;border-radius:4px;display:block;
background:var(--panel);outline:1px solid var(--rule)}
.tile.wrong img{outline:2px solid var(--bad)}.tile.wrong figcaption b{color:var(--bad)}
.tile figcaption{display:block;font-weight:400;font-size:13.5px;line-height:1.35;margin-top:6px;overflow-wrap:anywhere}
.pixels{image-rendering:pixelated}
.good{color:var(--good)}.bad{color:var(--bad)}
.barname{margin:12px 0 3px;font-size:13.5px;color:var(--muted)}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:9px;background:var(--k)}
.kind{fill:var(--k)}.count[class*=" k"]{fill:var(--on)!important}.count.k10{fill:var(--fg)!important}
#time .scroll{margin-top:16px;max-width:720px}
#calibration figure{max-width:430px}.pile{fill:var(--c)}
pre{background:var(--panel);padding:14px 16px;border-radius:4px;overflow-x:auto;font-size:13.5px;line-height:1.6}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.94em}
details{margin-top:16px}summary{cursor:pointer;color:var(--s0);font-size:14.5px}
footer{margin-top:56px;padding-top:12px;border-top:1px solid var(--rule);font-size:13.5px;color:var(--muted)}
@media (max-width:560px){main{padding:26px 16px 48px}h1{font-size:28px}h2{font-size:21px}header svg{width:36px}
.cards{grid-template-columns:1fr 1fr;gap:22px 18px}.cards dd{font-size:25px}section{margin-top:40px}
th,td{padding-left:11px}table{font-size:13.5px}.meter{min-width:60px}}
@media print{:root{--bg:#fff;--fg:#000;--muted:#444;--rule:#ccc;--panel:#f4f4f4;--s0:#1f5f8b;--s1:#b4541a;
--good:#1b7043;--bad:#b3261e;--on:#fff;LIGHT}body{font-size:11pt}main{max-width:none;padding:0}nav{display:none}
section{margin-top:26px}figure,tr,.cards div{break-inside:avoid}h2{break-after:avoid}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""

ICON = (
    '<svg viewBox="0 0 46 46" aria-hidden="true"><rect x="1.5" y="1.5" width="43" height="43" rx="3" fill="none" '
    'stroke="var(--s0)" stroke-width="3"/><path d="M17 2v42M2 17h42M31 17v27M17 31h27" stroke="var(--s0)" '
    'stroke-width="3" fill="none"/></svg>'
)


def _style() -> str:
    light, dark = ("".join(f"--k{i}:{colour};" for i, colour in enumerate(colours.split())) for colours in KIND_COLOURS)
    names = "".join(f".k{i}{{--k:var(--k{i})}}" for i in range(len(KIND_COLOURS[0].split())))
    return STYLE.replace("LIGHT", light).replace("DARK", dark) + names


def section(name: str, title: str, lead: str, body: str) -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}"><h2>{title}</h2>{lead}{body}</section>'


def missing(what: str, command: str) -> str:
    return f'<p class="missing">{escape(what)} Make it with</p><pre><code>{escape(command)}</code></pre>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """Cells are HTML; the first column is text, the others numbers."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{css}">{top}<tbody>{body}</tbody></table></div>'


def figure(drawing: str, caption: str, legend: str = "") -> str:
    return f"<figure><figcaption>{caption}{legend}</figcaption>{drawing}</figure>"


def key(names: Sequence[str]) -> str:
    marks = "".join(f'<span class="s{i}"><i></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<span class="key">{marks}</span>'


def document(title: str, heading: str, told: str, top: str, body: str, footer: str) -> str:
    """A whole page: `heading` and `told` at its head, `top` before the links to the sections of `body`; all HTML."""
    links = "".join(
        f'<a href="#{name}">{text}</a>' for name, text in re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', body)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_style()}</style></head><body><main>"
        f"<header>{ICON}<div><h1>{heading}</h1><p>{told}</p></div></header>"
        f"{top}<nav aria-label='sections'>{links}</nav>{body}"
        f"<footer>{footer} Hover over a chart for its figures.</footer>"
        "</main></body></html>\n"
    )


def meter(share: float) -> str:
    """A share as text over a bar of its length."""
    return f'<span class="meter" style="--v:{100 * share:.1f}%">{share:.1%}</span>'


def data_uri(picture: "Image") -> tuple[str, bool]:
    """An image inside the page, and whether it is so small that its pixels should be seen."""
    small = max(picture.size) <= 64
    file = io.BytesIO()
    if small:
        picture.save(file, "PNG")
    else:
        picture = picture.copy()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(file, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", small
