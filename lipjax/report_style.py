"""The style sheet of `lipjax.report`: light, dark, phone and paper; the colours are told apart by the colour-blind too."""

STYLE = """
:root {
  --page: #f6f6f3; --card: #ffffff; --ink: #18202c; --soft: #566070; --rule: #dfe2e6;
  --proved: #0068a8; --proved-soft: #b9d9ee; --open: #c9cdd3; --open-line: #9aa1ab; --attacked: #c94f00; --wrong: #3a3f48;
  --shade: #eef0f2; --warning: #fff4d6;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; --ink: #e7ebf0; --soft: #a3aebc; --rule: #313946;
    --proved: #5cb8ee; --proved-soft: #274f6b; --open: #4a5361; --open-line: #7b8694; --attacked: #ff9a55; --wrong: #cfd5dd;
    --shade: #232a35; --warning: #3d3517;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.25rem 3rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif;
  -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
h1 { font-size: clamp(1.5rem, 3.6vw, 2.3rem); line-height: 1.22; font-weight: 650; letter-spacing: -.015em; 
  margin: .3rem 0 1.4rem; text-wrap: balance; max-width: 30em; }
h1 data { color: var(--proved); white-space: nowrap; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 .9rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.6rem 0 .7rem; font-weight: 650; }
p { margin: .5rem 0; }
.kicker { letter-spacing: .04em; font-size: .78rem; color: var(--soft); margin: 0; font-weight: 600; }
.soft, .note { color: var(--soft); }
.note { font-size: .86rem; margin: .8rem 0 0; }
.warning { background: var(--warning); padding: .7rem 1rem; border-radius: 8px; }
blockquote { margin: 1.2rem 0; padding: .1rem 0 .1rem 1.1rem; border-left: 3px solid var(--proved); color: var(--soft);
  font-size: .94rem; }
dl, dd, dt { margin: 0; }
dt { color: var(--soft); font-size: .82rem; }
dd { overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: .8rem 1.6rem; }
.facts dd { font-size: .95rem; line-height: 1.4; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 1.3rem 1.4rem 1.4rem;
  margin: 0 0 1.25rem; min-width: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.25rem; margin-bottom: 1.25rem; }
.pair > .card { margin: 0; }
header { margin-bottom: 2rem; }
footer { color: var(--soft); font-size: .86rem; margin-top: 2rem; }

/* tables */
.scroll { overflow-x: auto; border-radius: 6px; }
.scroll.long { max-height: 30rem; overflow-y: auto; }
.narrow { max-width: 34rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .84rem; padding-bottom: .4rem; }
th, td { text-align: left; padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: .82rem; }
.long thead th { position: sticky; top: 0; background: var(--card); }
td:has(> data), .meter { white-space: nowrap; }
.meter { padding-left: .5rem; border-left: 3px solid var(--card);
  background: linear-gradient(var(--tint), var(--tint)) left / var(--share) 100% no-repeat; }
.meter.clean { --tint: var(--shade); }
.meter.pgd { --tint: color-mix(in srgb, var(--attacked) 22%, var(--card)); }
.meter.certified { --tint: var(--proved-soft); }

/* bars and keys */
.stack { display: flex; gap: 2px; height: 14px; border-radius: 4px; overflow: hidden; background: var(--rule); }
.stack.tall { height: 34px; border-radius: 6px; }
.stack span { min-width: 2px; flex-basis: 0; }
.over { font-size: .86rem; margin: .65rem 0 .2rem; }
.legend { list-style: none; padding: 0; margin: .9rem 0 0; display: grid; gap: .3rem 1.6rem;
  grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); font-size: .92rem; }
.legend.inline { display: flex; flex-wrap: wrap; font-size: .86rem; margin: .5rem 0; }
.swatch { display: inline-block; width: .85em; height: .85em; border-radius: 3px; margin-right: .5em; vertical-align: -.06em; }
.swatch.tick { width: 2px; border-radius: 0; background: var(--ink); margin: 0 .8em 0 .3em; }
span.proved { background: var(--proved); }
span.below { background: var(--proved-soft); }
span.undecided { background: repeating-linear-gradient(135deg, var(--open) 0 4px, var(--card) 4px 6px); }
span.attacked { background: var(--attacked); }
span.wrong { background: var(--wrong); }
span.open { background: var(--open); opacity: .55; }
span.rest { background: var(--rule); }

/* charts */
.chart { display: block; width: 100%; height: auto; max-width: 640px; margin: 0 auto; }
.chart text { font-family: inherit; font-size: 12.5px; fill: var(--ink); }
.chart .tick { fill: var(--soft); font-size: 11.5px; }
.chart .middle { text-anchor: middle; }
.chart .end { text-anchor: end; }
.chart .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.chart .grid { stroke: var(--rule); }
.chart .axis { stroke: var(--open-line); }
.chart .marker { stroke: var(--ink); stroke-dasharray: 2 3; stroke-width: 1.4; }
.chart .line { fill: none; stroke-width: 2.4; stroke-linejoin: round; }
.chart .line.proved { stroke: var(--proved); }
.chart .line.attacked { stroke: var(--attacked); stroke-dasharray: 7 4; stroke-width: 2; }
.chart .dot.attacked { fill: var(--card); stroke: var(--attacked); stroke-width: 2; }
.chart .area.proved { fill: var(--proved-soft); opacity: .55; }
.chart .area.undecided { fill: var(--open); opacity: .4; }
.chart .bar.proved { fill: var(--proved); }
.chart .bar.below { fill: var(--proved-soft); }

/* gallery */
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(228px, 1fr)); gap: 1rem; }
.example { border: 1px solid var(--rule); border-radius: 10px; padding: .8rem .9rem .9rem; }
.title { display: flex; justify-content: space-between; align-items: center; gap: .5rem; margin: 0 0 .6rem; font-size: .88rem; }
.badge { font-size: .75rem; font-weight: 600; padding: .1rem .55rem; border-radius: 99px; border: 1.5px solid;
  white-space: nowrap; }
.title .badge { background: none; }
.title strong { white-space: nowrap; }
.badge.proved { color: var(--proved); } .badge.attacked { color: var(--attacked); }
.badge.undecided { color: var(--soft); } .badge.wrong { color: var(--ink); }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; border-radius: 4px;
  background: var(--shade); }
figcaption { font-size: .75rem; color: var(--soft); margin-top: .2rem; }
.bracket { position: relative; height: 14px; background: var(--shade); border-radius: 3px; margin: .9rem 0 .5rem; }
.bracket span { position: absolute; top: 0; bottom: 0; }
.bracket .mark { width: 4px; margin-left: -2px; top: -3px; bottom: -3px; border-radius: 2px; }
.bracket .tick { width: 2px; margin-left: -1px; top: -5px; bottom: -5px; background: var(--ink); }
.plain { list-style: none; padding: 0; margin: 0; font-size: .88rem; }

/* text of programs */
pre { background: var(--shade); border-radius: 8px; padding: .9rem 1rem; overflow-x: auto; font-size: .86rem;
  line-height: 1.6; margin: 0 0 .8rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.hashes > div { margin-bottom: .8rem; }
.hashes dt { color: var(--ink); font-weight: 600; font-size: .92rem; }
.hashes dd { font-size: .84rem; color: var(--soft); }
.hashes code { color: var(--ink); font-size: .92em; overflow-wrap: anywhere; }
.config { columns: 17rem; column-gap: 2rem; font-size: .86rem; }
.config div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--rule); padding: .22rem 0;
  break-inside: avoid; }
.config dt { font-size: inherit; }
.config dd { text-align: right; }
:focus-visible { outline: 2px solid var(--proved); outline-offset: 2px; }

@media (max-width: 860px) { .pair { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 520px) {
  body { padding: 1.3rem .8rem 2rem; }
  .card { padding: 1.05rem 1rem 1.1rem; border-radius: 10px; }
  .legend { grid-template-columns: 1fr; }
  .facts { grid-template-columns: 1fr 1fr; }
  table { font-size: .85rem; }
  th, td { padding-right: .4rem; }
  .meter { padding-left: .25rem; border-left-width: 2px; }
}
@media print {
  :root { --page: #ffffff; }
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  .card { border: 0; padding: 0; margin-bottom: 1.6rem; }
  .card, .example, .chart, tr { break-inside: avoid; }
  .wide { break-inside: auto; }
  .scroll, .scroll.long, pre { overflow: visible; max-height: none; white-space: pre-wrap; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: .5rem; }
  .example { padding: .5rem .6rem; }
  .title { font-size: .8rem; } .badge { font-size: .62rem; padding: .05rem .35rem; }
  .pair { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
