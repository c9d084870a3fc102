"""Style sheet of the report, for phones and screens, light and dark."""

STYLE = """
:root{color-scheme:light dark;--ground:#fcfcfa;--card:#fff;--ink:#20242b;--dim:#666e7a;--line:#e3e5e8;
--c0:#2563c9;--c1:#c2410c;--c2:#15803d;--c3:#9333a8;--c4:#0e7f8c;--c5:#9a6b00;--c6:#d0205f;--c7:#5b6470}
@media(prefers-color-scheme:dark){:root{--ground:#15171b;--card:#1d2026;--ink:#e6e8ec;--dim:#9aa3af;--line:#32363e;
--c0:#7aa7ff;--c1:#ff9466;--c2:#5fce85;--c3:#d78bea;--c4:#5cc8d4;--c5:#e0b04c;--c6:#ff7aa6;--c7:#aab2bd}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.45 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:12px 14px 48px}
h1,h2,h3,h4{line-height:1.2;margin:1.2em 0 .5em;overflow-wrap:anywhere}h1{font-size:1.5rem}h2{font-size:1.25rem}
h3{font-size:1.05rem}h4{font-size:.95rem;color:var(--dim)}
dl{display:flex;flex-wrap:wrap;gap:8px 28px;margin:0 0 14px}
dt{color:var(--dim);font-size:.85rem}dd{margin:0;font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px}
.charts figure{margin:0;padding:10px 12px;background:var(--card);border:1px solid var(--line);border-radius:8px}
figcaption{font-size:.92rem;font-weight:600;margin-bottom:4px}
figure>svg{display:block;width:100%;height:auto}
svg text{fill:var(--dim);font:17px system-ui,sans-serif}
svg path,svg circle{fill:none;stroke-width:2.5;stroke-linejoin:round}
svg .grid{stroke:var(--line);stroke-width:1}svg .faint{opacity:.3;stroke-width:1.2}svg .bar{stroke-width:1.6;opacity:.7}
.key{display:flex;flex-wrap:wrap;gap:2px 16px;margin:4px 0 0;font-size:.85rem;color:var(--dim)}
.key b{color:var(--ink)}
.key i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
.strip{display:flex;gap:10px;overflow-x:auto;padding-bottom:6px}
.strip figure{margin:0;flex:0 0 auto;width:min(78vw,300px)}
.strip video,.strip img{width:100%;display:block;border-radius:6px;background:#000}
.strip figcaption{font-weight:400;color:var(--dim);margin-top:3px}
details{margin:14px 0;padding:10px 12px;background:var(--card);border:1px solid var(--line);border-radius:8px}
summary{cursor:pointer;font-weight:600}
pre,td{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.4 ui-monospace,monospace}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:3px 8px 3px 0;border-top:1px solid var(--line)}
th{font:13px/1.4 ui-monospace,monospace;color:var(--dim);overflow-wrap:anywhere;width:38%}
@media(max-width:560px){svg text{font-size:25px}svg path{stroke-width:3.5}}
""" + "".join(
    f".c{i}{{stroke:var(--c{i})}}circle.c{i}{{fill:var(--c{i})}}.k{i}{{background:var(--c{i})}}\n" for i in range(8)
)
