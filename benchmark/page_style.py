"""How the page of a report looks, on a screen, a phone and paper, and the little it can do: sort, filter, point."""

CSS = """
:root { color-scheme: light; --ink: #1b2420; --soft: #5a6660; --line: #dde3df; --paper: #fff; --wash: #f4f7f5;
  --accent: #1f7a4d; --warn: #8a5a00; --warn-wash: #fdf4e0; --first: #9fb0a7; --second: #1f7a4d; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --ink: #e6ece8; --soft: #9aa8a0;
  --line: #313a35; --paper: #141916; --wash: #1c2320; --accent: #5cc690; --warn: #f0c368; --warn-wash: #2c2414;
  --first: #65736b; --second: #5cc690; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; letter-spacing: -.01em; }
h1 { font-size: clamp(1.7rem, 5vw, 2.3rem); margin: 0 0 .35rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .6rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; }
.lead { font-size: clamp(1.1rem, 3vw, 1.25rem); line-height: 1.5; margin: 1rem 0; text-wrap: pretty; }
.note, figcaption { color: var(--soft); font-size: .9rem; }
.warning { background: var(--warn-wash); color: var(--warn); border-left: 3px solid currentColor; padding: .5rem .9rem;
  border-radius: 2px; font-size: .95rem; }
figure { margin: 1.75rem 0; }
figcaption { margin-top: .5rem; max-width: 44rem; }

.plot { margin: .3rem 1rem 2rem 3.1rem; height: 24rem; border: solid var(--soft); border-width: 0 0 1px 1px; }
.plot > svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot text { fill: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; }
.axis { margin: 0; color: var(--soft); font-size: .85rem; max-width: none; }
.across { text-align: center; }
.grid { stroke: var(--line); }
.front { stroke: var(--accent); stroke-width: 3; stroke-opacity: .55; stroke-linecap: round; }
.pair { stroke: var(--c); stroke-width: 1.5; stroke-dasharray: 1 5; stroke-linecap: round; }
.span { stroke: var(--c); stroke-width: 2.5; }
.mark { outline: none; cursor: default; }
.mark svg > :not(.reach), .key svg > :not(.front) { fill: var(--c); stroke: var(--c);
  stroke-width: 2.5; stroke-linejoin: round; }
.mark.hollow svg > :not(.reach) { fill: var(--paper); }
.reach { fill: transparent; }
.mark:hover .reach, .mark:focus .reach { fill: var(--c); fill-opacity: .22; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 .75rem; padding: 0;
  font-size: .88rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.key { width: 1.4rem; height: 1.1rem; flex: none; }
#tip { position: fixed; z-index: 1; max-width: min(22rem, calc(100vw - 1rem)); padding: .5rem .75rem;
  border-radius: 4px; background: var(--ink); color: var(--paper); font-size: .85rem; line-height: 1.45;
  white-space: pre-line; pointer-events: none; }
#tip::first-line { font-weight: 600; }

.tools { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .9rem; margin: .75rem 0; }
.tools input { font: inherit; font-size: .93rem; width: min(100%, 22rem); padding: .35rem .6rem; color: inherit;
  background: var(--wash); border: 1px solid var(--line); border-radius: 4px; }
.table:has(> .sortable) { position: relative; left: 50%; transform: translateX(-50%); width: max-content;
  min-width: 100%; max-width: min(100vw - 3rem, 90rem); }
.table { overflow-x: auto; margin: .75rem 0; background:
  linear-gradient(90deg, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(270deg, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) 0 0 / .8rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--line), transparent) 100% 0 / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 0 .42rem .95rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; border-bottom-color: var(--soft);
  vertical-align: bottom; }
tbody th { font-weight: 400; min-width: 7rem; max-width: 22rem; overflow-wrap: anywhere; }
td { white-space: nowrap; }
.text { text-align: left; }
.sortable .text { white-space: normal; }
.whole { white-space: nowrap; }
.hidden { position: absolute; clip-path: inset(50%); }
thead button { all: unset; cursor: pointer; }
thead button:hover, thead button:focus-visible { color: var(--ink); text-decoration: underline; }
thead button:focus-visible, .tools input:focus-visible, .table:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
[aria-sort] button::after { content: "\\2195"; opacity: .45; padding-left: .25em; }
[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.layers .bar { width: 45%; min-width: 7rem; vertical-align: middle; }
.layers i { display: block; height: .5rem; border-radius: 0 2px 2px 0; min-width: 1px; }
.layers .m0 { background: var(--first); }
.layers .m1 { background: var(--second); }
.layers .s0 { color: var(--first); }
.layers .s1 { color: var(--second); }
small { color: var(--soft); }
dl { display: grid; grid-template-columns: minmax(8rem, 13rem) 1fr; gap: .35rem 1.1rem; margin: .75rem 0;
  font-size: .93rem; }
dt { color: var(--soft); }
dd { margin: 0; }
pre { background: var(--wash); border-radius: 4px; padding: .8rem 1rem; font-size: .88rem; line-height: 1.5;
  white-space: pre-wrap; }
@media (max-width: 30rem) {
  body { padding-top: 1.5rem; }
  .plot { height: 19rem; margin-left: 2.6rem; margin-right: .5rem; }
  table { font-size: .82rem; }
  thead th { font-size: .78rem; }
  th, td { padding-left: .6rem; }
  tbody th { min-width: 5.5rem; }
  .layers, .layers thead, .layers tbody { display: block; }
  .layers tr { display: flex; flex-wrap: wrap; align-items: end; border-bottom: 1px solid var(--line); }
  .layers tr > * { flex: 0 0 4.4rem; padding-left: .3rem; border-bottom: 0; }
  .layers tbody th { flex-basis: 100%; max-width: none; padding: .42rem 0 0; }
  .layers .bar, .layers thead th:first-child { flex: 1 1 4rem; min-width: 0; padding-left: 0; }
  .layers .bar { align-self: center; }
  .layers thead th:nth-child(2) { display: none; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  @page { margin: 16mm 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .tools, #tip { display: none; }
  [aria-sort=none] button::after { content: none; }
  .plot { height: 95mm; }
  .table, .table:has(> .sortable) { background: none; overflow: visible; position: static; transform: none; width: auto;
    max-width: none; }
  table { font-size: 8.5pt; }
  th, td { padding-left: .6rem; }
  .sortable { font-size: 7.5pt; }
  .sortable th, .sortable td { padding-left: .45rem; }
  .sortable thead th { font-size: 7pt; }
  tbody th { min-width: 4.5rem; }
  .sortable button { display: contents; }
  h2 { margin-top: 1.5rem; padding-top: .9rem; }
  h2, h3 { break-after: avoid; }
  figure, tr, dl, pre, .table:not(:has(tr:nth-child(13))) { break-inside: avoid; }
  thead { display: table-header-group; }
}
"""

JS = """
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], all = [...body.rows];
  const value = (row, column) => {
    const cell = row.cells[column], own = cell.dataset.value;
    return own === undefined ? cell.textContent : own === '' ? null : Number(own);
  };
  const compare = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b
    : String(a).localeCompare(String(b), undefined, {numeric: true});
  const sort = (column) => {
    const sign = heads[column].getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    heads.forEach((head) => head.setAttribute('aria-sort', 'none'));
    heads[column].setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
    all.sort((one, other) => {
      const a = value(one, column), b = value(other, column);
      return a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b);
    });
    body.append(...all);
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener('click', () => sort(column)));
  const tools = table.parentElement.previousElementSibling, box = tools.firstElementChild;
  const filter = () => {
    const words = box.value.toLowerCase().split(/\\s+/);
    for (const row of all) {
      const text = [...row.cells].map((cell) => cell.textContent).join(' ').toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    tools.lastElementChild.textContent = `${all.filter((row) => !row.hidden).length} of ${all.length} rows`;
  };
  box.addEventListener('input', filter);
  tools.hidden = all.length < 3;
  filter();
}
const scrollers = document.querySelectorAll('.table');
const reach = () => scrollers.forEach((box) => {
  // Without a pointer only what has the focus scrolls, and a stop that does nothing is in the way.
  if (box.scrollWidth > box.clientWidth) {
    box.tabIndex = 0;
    box.setAttribute('role', 'region');
    box.setAttribute('aria-label', 'Table, wider than the page');
  } else ['tabindex', 'role', 'aria-label'].forEach((name) => box.removeAttribute(name));
});
addEventListener('resize', reach);
reach();
const tip = document.getElementById('tip');
const hide = () => { tip.hidden = true; };
const show = (mark) => {
  tip.textContent = mark.getAttribute('aria-label');
  tip.hidden = false;
  const place = mark.querySelector('.reach').getBoundingClientRect();
  const left = (place.left + place.right - tip.offsetWidth) / 2;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  const above = place.top - tip.offsetHeight - 4;
  tip.style.top = `${above < 4 ? place.bottom + 4 : above}px`;
};
for (const mark of document.querySelectorAll('.mark')) {
  for (const event of ['pointerenter', 'focus', 'click']) mark.addEventListener(event, () => show(mark));
  for (const event of ['pointerleave', 'blur']) mark.addEventListener(event, hide);
}
addEventListener('scroll', hide, {passive: true, capture: true});
addEventListener('keydown', (event) => { if (event.key === 'Escape') hide(); });
"""
