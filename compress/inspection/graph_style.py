"""How the page of a channel graph looks, on a screen, a phone and paper, and the little it can do: choose, search."""

CSS = """
:root { color-scheme: light; --ink: #1b2420; --soft: #5a6660; --line: #dde3df; --paper: #fff; --card: #fff;
  --wash: #f4f7f5; --accent: #1f7a4d; --frozen: repeating-linear-gradient(135deg, #8b948f 0 3px, #b9c1bc 3px 6px); }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --ink: #e6ece8; --soft: #9aa8a0;
  --line: #313a35; --paper: #141916; --card: #1a201d; --wash: #1c2320; --accent: #5cc690; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 60rem; }
.note { color: var(--soft); font-size: .88rem; }
button { font: inherit; color: inherit; text-align: inherit; cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.tools { position: sticky; top: 0; z-index: 3; display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: center;
  background: var(--paper); padding: .6rem 0; border-bottom: 1px solid var(--line); margin: 1rem 0; }
.tools input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--soft);
  border-radius: 6px; padding: .35rem .6rem; flex: 1 1 12rem; max-width: 26rem; min-width: 0; }
.tools button, .panel > button { background: var(--wash); border: 1px solid var(--line); border-radius: 6px;
  padding: .35rem .7rem; }
.stage { display: grid; grid-template-columns: minmax(0, 1fr) 21rem; gap: 1.5rem; align-items: start; }
.blocks { list-style: none; margin: 0; padding: 0; }
.block { position: relative; padding: .45rem 0 .75rem calc(var(--lanes) + .6rem); min-height: 2.6rem; }
.lanes { position: absolute; left: 0; top: 0; width: var(--lanes); height: calc(100% + 1px); overflow: visible; }
.lanes * { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.lanes circle { fill: var(--ink); stroke: none; }
.head { display: flex; flex-wrap: wrap; gap: .1rem .7rem; align-items: baseline; line-height: 1.4; }
.head b { font-weight: 650; }
.head .share { margin-left: auto; color: var(--soft); font-size: .82rem; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.head .share::before { content: ""; display: inline-block; height: .5rem; width: calc(var(--share) * 9rem + 1px);
  max-width: 9rem; background: var(--soft); margin-right: .5rem; border-radius: 1px; }
.chips { display: flex; flex-wrap: wrap; gap: .45rem; margin-top: .3rem; align-items: stretch; }
.part { display: flex; flex-wrap: wrap; gap: .3rem; border: 1px solid var(--line); border-radius: 8px;
  padding: 1.15rem .3rem .3rem; position: relative; }
.part > span { position: absolute; top: .05rem; left: .45rem; font-size: .72rem; color: var(--soft); }
.chip { position: relative; isolation: isolate; display: grid; gap: 0 .6rem; grid-template-columns: auto auto;
  min-width: 6.4rem; max-width: 100%; padding: .45rem .5rem .55rem; border: 1px solid var(--line); border-radius: 6px;
  overflow: hidden; font-size: .8rem; line-height: 1.35; font-variant-numeric: tabular-nums; align-content: start;
  background: var(--reads) top / 100% 4px no-repeat, var(--frozen) top / 100% 4px no-repeat,
    var(--makes) bottom / 100% 7px no-repeat, var(--frozen) bottom / 100% 7px no-repeat, var(--card); }
.chip::before { content: ""; position: absolute; inset: 4px 0 7px; z-index: -1; background: var(--makes);
  opacity: .2; }
.chip > :nth-child(even) { text-align: right; }
.chip i { font-style: normal; color: var(--soft); }
.selecting .chip:not(.makes, .reads), .searching .chip:not(.hit) { opacity: .28; }
.selecting .chip.makes { outline: 3px solid var(--ink); outline-offset: 0; }
.selecting .chip.reads:not(.makes) { outline: 2px dashed var(--ink); outline-offset: 0; }
.panel { position: sticky; top: 4.2rem; max-height: calc(100vh - 5rem); overflow: auto; font-size: .88rem;
  background: var(--wash); border-radius: 8px; padding: .8rem 1rem; }
.panel > button { float: right; padding: .1rem .5rem; }
.panel pre { font: inherit; white-space: pre-wrap; margin: 0 0 .6rem; }
.panel dl { display: grid; grid-template-columns: 6.6rem 1fr; gap: .15rem .6rem; margin: .7rem 0 0; padding-top: .7rem;
  border-top: 1px solid var(--line); }
dt { color: var(--soft); }
dd { margin: 0; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .4rem;
  vertical-align: -.08rem; }
.pick { border: 0; background: none; padding: 0; text-decoration: underline dotted; text-underline-offset: 3px;
  white-space: nowrap; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
thead th { color: var(--soft); font-weight: 600; border-bottom-color: var(--soft); vertical-align: bottom; }
td.n, th.n { text-align: right; }
td.n, td.w { white-space: nowrap; }
td.l { min-width: 11rem; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
tr.on { background: var(--wash); box-shadow: inset 3px 0 var(--ink); }
@media (max-width: 60rem) {
  .stage { grid-template-columns: minmax(0, 1fr); }
  .panel { position: fixed; inset: auto 0 0 0; z-index: 4; max-height: 42vh; border-radius: 12px 12px 0 0;
    border-top: 1px solid var(--soft); padding-bottom: 1.2rem; }
  body:not(.selecting) .panel { display: none; }
  .selecting { padding-bottom: 45vh; }
}
@media (max-width: 32rem) {
  body { padding: 1.2rem .8rem 3rem; }
  .chip { font-size: .76rem; min-width: 5.6rem; }
  .head .share::before { width: calc(var(--share) * 4rem + 1px); }
}
@media print {
  :root { font-size: 9pt; }
  body { max-width: none; padding: 0; }
  .tools, .panel { display: none; }
  .stage { display: block; }
  .block, tr { break-inside: avoid; }
  .block { padding-bottom: .4rem; }
  .chip { font-size: 7.5pt; min-width: 5rem; padding: .3rem .35rem .5rem; }
  .table { overflow: visible; }
  table { font-size: 6.5pt; line-height: 1.25; }
  th, td { padding: .15rem .5rem .15rem 0; }
  td.l { min-width: 0; }
  .pick { text-decoration: none; }
}
"""

# It only sets classes and clones what is on the page: no text ever becomes HTML here.
JS = """
'use strict';
const all = (query) => [...document.querySelectorAll(query)];
const chips = all('.chip'), rows = all('tr[data-group]'), box = document.getElementById('search');
const found = document.getElementById('found'), panel = document.getElementById('panel');
const heads = all('#groups th').map((cell) => cell.textContent);
const has = (chip, key, groups) => chip.dataset[key].split(' ').some((group) => groups.includes(group));

function card(row) {
  const list = document.createElement('dl');
  [...row.cells].forEach((cell, column) => {
    if (!cell.textContent.trim()) return;
    const name = document.createElement('dt'), value = document.createElement('dd');
    name.textContent = heads[column];
    value.append(...cell.cloneNode(true).childNodes);
    list.append(name, value);
  });
  return list;
}

function select(groups, chip) {
  document.body.classList.toggle('selecting', groups.length > 0 || Boolean(chip));
  chips.forEach((each) => {
    each.classList.toggle('makes', each === chip || has(each, 'makes', groups));
    each.classList.toggle('reads', has(each, 'reads', groups));
  });
  const chosen = rows.filter((row) => groups.includes(row.dataset.group));
  rows.forEach((row) => row.classList.toggle('on', chosen.includes(row)));
  const text = document.createElement('pre');
  text.textContent = chip ? chip.title : 'Solid outline: makes or carries the group. Dashed: reads it.';
  panel.querySelector('div').replaceChildren(text, ...chosen.map(card));
  panel.scrollTop = 0;
  history.replaceState(null, '', groups.length ? '#g' + groups.join('+') : '#');
}

function search(text) {
  const wanted = text.trim().toLowerCase();
  const hits = chips.filter((chip) => {
    const hit = wanted !== '' && chip.dataset.text.includes(wanted);
    chip.classList.toggle('hit', hit);
    return hit;
  });
  document.body.classList.toggle('searching', wanted !== '');
  found.textContent = wanted === '' ? '' : hits.length + ' of ' + chips.length + ' layers';
  return hits;
}

function scroll(chosen) {
  if (chosen.length) chosen[0].scrollIntoView({ block: 'center' });
}

function show(groups) {
  select(groups);
  scroll(chips.filter((chip) => chip.classList.contains('makes')));
}

function clear() {
  box.value = '';
  search('');
  select([]);
}

document.addEventListener('click', (event) => {
  const chip = event.target.closest('.chip'), pick = event.target.closest('.pick');
  if (chip) select(chip.dataset.makes.split(' ').filter(Boolean), chip);
  if (pick) show([pick.dataset.group]);
  if (event.target.closest('.clear')) clear();
});
document.addEventListener('keydown', (event) => { if (event.key === 'Escape') clear(); });
box.addEventListener('input', () => search(box.value));
box.addEventListener('keydown', (event) => {
  if (event.key === 'Enter') scroll(search(box.value));
});
const asked = decodeURIComponent(location.hash);
if (asked.startsWith('#g')) show(asked.slice(2).split('+').filter((group) => /^[0-9]+$/.test(group)));
if (asked.startsWith('#q=')) { box.value = asked.slice(3); scroll(search(box.value)); }
"""
