"""The style sheet and the one script of the page, both inside the file."""

from __future__ import annotations

import base64
import hashlib

from .colours import LEVELS, MARKS, THEMES, css, ink_on, ramp

__all__ = ["SCRIPT", "policy", "sheet"]

RULES = """\
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:22px;margin:26px 0 4px;letter-spacing:-.005em;overflow-wrap:anywhere}
section+section{border-top:1px solid var(--line);margin-top:44px}
h3{font-size:18px;margin:32px 0 10px}
h4{font-size:15px;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:0 0 10px;max-width:76ch}
a{color:var(--accent)}
.soft,.sub,figcaption,.note{color:var(--soft)}
.note,figcaption{font-size:13px}
.scroll+.note{margin-top:12px}
.lead{font-size:17px;margin:12px 0 16px}
.sub{display:block;font-size:12px;font-weight:400;white-space:nowrap}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px;
margin:0 0 14px}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
.grid>.card{margin:0}
.grid+.card{margin-top:14px}
.scroll{overflow-x:auto;margin:0 -18px;padding:0 18px}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);
outline-offset:2px;border-radius:6px}
nav{display:flex;flex-wrap:wrap;gap:6px 14px;margin:14px 0 0;font-size:14px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:13px;padding:0 0 8px}
th,td{text-align:right;padding:8px 8px;vertical-align:top;white-space:nowrap}
th{font-weight:600}
thead th{font-size:12.5px;color:var(--soft);border-bottom:1px solid var(--line);
vertical-align:bottom}
tbody tr+tr>*{border-top:1px solid var(--line)}
th[scope=row],td.text,th.text{text-align:left}
.wide{width:100%}
.stick{border-collapse:separate;border-spacing:0}
.stick th[scope=row],.stick thead th:first-child{position:sticky;left:0;background:var(--card);
z-index:1}
.who{display:flex;align-items:flex-start;gap:7px}
.name{overflow-wrap:break-word;white-space:normal;min-width:0}
.key{width:14px;height:14px;margin-top:4px;flex:none}
th .name{min-width:84px;max-width:215px}
h4 .name{max-width:none}
abbr{text-decoration:none}
.bar{display:block;height:4px;border-radius:2px;background:var(--low);margin-top:4px;
min-width:76px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--c,var(--accent));border-radius:2px}
.chip{display:inline-block;font-size:12px;border:1px solid var(--line);border-radius:99px;
padding:0 8px;margin-top:3px}
.good{color:var(--good)}.bad{color:var(--bad)}
.best{font-weight:700}
figure{margin:0}
svg.plot{display:block;width:100%;max-width:680px;height:auto;overflow:visible}
svg text{fill:var(--ink);font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
svg text.near{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
svg .soft{fill:var(--soft)}
svg .grid-line{stroke:var(--line);stroke-width:1}
svg .edge{fill:none;stroke:var(--soft);stroke-width:1.5;stroke-dasharray:2 4}
svg .full-line{stroke:var(--full);stroke-width:1;stroke-dasharray:6 4;opacity:.55}
svg .whisker{stroke:var(--c);stroke-width:1.5;opacity:.55;fill:none}
svg .curve{stroke:var(--c);stroke-width:2;fill:none}
svg .mark{fill:var(--c);stroke:var(--card);stroke-width:1.2}
.narrow{display:none!important}
.heat{border-spacing:2px;border-collapse:separate}
.heat td,.heat th{border:0!important;padding:0;font-size:11.5px}
.heat th{color:var(--soft);font-weight:400;padding:0 6px 0 0;text-align:right;
vertical-align:middle}
.heat thead th{padding:0 5px 2px;text-align:center;vertical-align:bottom}
.heat td{min-width:34px;height:26px;border-radius:4px;text-align:center;vertical-align:middle;
padding:0 3px}
.heat.small td{min-width:0;width:13px;height:13px;border-radius:2px}
.heat.small th{font-size:10px}
.none{background:repeating-linear-gradient(45deg,var(--line) 0 2px,transparent 2px 5px)}
.maps{display:flex;flex-wrap:wrap;gap:16px 26px}
.maps>*{max-width:100%}
.maps>.scroll{margin:0;padding:0}
.scale{white-space:nowrap;display:inline-block;margin-right:16px}
.legend{display:inline-flex;align-items:center;gap:2px;margin:0 6px;vertical-align:middle}
.legend i{width:18px;height:12px;display:inline-block;border-radius:2px}
.thumbs{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));
max-width:1120px;
margin:14px 0 0}
.thumbs img,.strip img{display:block;width:100%;image-rendering:pixelated;background:var(--low)}
.thumbs img{height:auto;aspect-ratio:1;border:1px solid var(--line);border-radius:6px}
.thumbs figcaption{margin-top:4px;line-height:1.35}
.strip{position:relative;margin:10px 0 2px;padding-top:18px}
.strip img{height:30px;border:1px solid var(--line);border-radius:6px}
.strip .here{position:absolute;top:0;bottom:-4px;width:0;border-left:2px solid var(--bad)}
.strip .here b{position:absolute;top:-3px;font-size:11px;line-height:1.4;font-weight:600;
color:var(--bad);white-space:nowrap;left:4px}
.strip .here.late b{left:auto;right:6px}
.ticks{display:flex;justify-content:space-between;font-size:11.5px;color:var(--soft)}
summary{cursor:pointer;font-weight:600;padding:4px 0}
details>*+*{margin-top:8px}
pre,code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--low);border-radius:8px;
padding:12px;margin:8px 0 0;max-height:360px;overflow:auto}
code{overflow-wrap:anywhere}
.answer{max-width:260px;white-space:normal;overflow-wrap:anywhere;text-align:left}
.answer .said{display:block;font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
color:var(--soft)}
bdi{unicode-bidi:isolate}
dl{display:grid;grid-template-columns:fit-content(240px) 1fr;gap:4px 18px;margin:0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere;min-width:0}
label.pick{display:none;font-size:14px;gap:6px;align-items:center;margin:0 0 8px}
.script label.pick{display:flex}
.only-different tr.same{display:none}
.seen-not{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);
white-space:nowrap}
footer{color:var(--soft);font-size:13px;margin-top:34px}
@media (max-width:640px){
main{padding:18px 12px 40px}h1{font-size:23px}.card{padding:14px;border-radius:10px}
.scroll{margin:0 -14px;padding:0 14px}
.legend i{width:11px}
.wide-only{display:none!important}.narrow{display:block!important}
th,td{padding:7px 8px}th .name{max-width:100px;font-size:13px}
.thumbs{grid-template-columns:repeat(auto-fit,minmax(92px,1fr));gap:10px}
dl{grid-template-columns:1fr;gap:0}dd{margin:0 0 8px}}
@media print{.card{break-inside:avoid}body{background:#fff}}
"""

SCRIPT = """\
document.documentElement.classList.add("script");
document.querySelectorAll("label.pick input").forEach(function (box) {
  box.addEventListener("change", function () {
    box.closest(".items").classList.toggle("only-different", box.checked);
  });
});
"""


def sheet() -> str:
    """Return the style sheet: variables of both themes, then the rules."""
    light, dark = (_variables(theme) for theme in ("light", "dark"))
    marks = "".join(f".c{i}{{--c:var(--p{i})}}" for i in range(MARKS))
    levels = "".join(f".v{i}{{background:var(--v{i});color:var(--t{i})}}" for i in range(LEVELS))
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"{marks}.cf{{--c:var(--full)}}\n{levels}\n{RULES}"
    )


def _variables(theme: str) -> str:
    steps = [(i, ramp(theme, i)) for i in range(LEVELS)]
    words = [f"--{name}:{value}" for name, value in THEMES[theme].items()]
    words += [f"--v{i}:{css(colour)};--t{i}:{css(ink_on(colour))}" for i, colour in steps]
    return ";".join(words)


def policy() -> str:
    """Return the page's content security policy: nothing from outside, and this script only."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
