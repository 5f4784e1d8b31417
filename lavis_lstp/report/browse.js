"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 20;
  const ORDER = { wrong: 0, unjudged: 1, right: 2 };
  const byId = (id) => document.getElementById(id);
  const of = byId("of"), status = byId("status"), category = byId("category"), search = byId("search");
  const list = byId("list"), count = byId("count"), place = byId("place"), previous = byId("previous"), next = byId("next");
  const cell = (column, i) => {
    if (!column) return null;
    return column.of ? (column.at[i] < 0 ? null : column.of[column.at[i]]) : column[i];
  };
  const row = (columns, i) => Object.fromEntries(Object.keys(columns).map((name) => [name, cell(columns[name], i)]));
  const orders = data.runs.map(() => null);
  let texts = null, found = [], first = 0;

  // Wrong answers first, unjudged ones next, right ones last; questions that the evaluation does not have are left out.
  function orderOf(run) {
    if (!orders[run]) {
      const groups = [[], [], []], statuses = data.runs[run].columns.status;
      for (let i = 0; i < data.count; i++) {
        const status = cell(statuses, i);
        if (status) groups[ORDER[status]].push(i);
      }
      orders[run] = groups.flat();
    }
    return orders[run];
  }

  // What is searched in, made when somebody searches.
  function textOf(i) {
    texts = texts || new Array(data.count);
    if (texts[i] === undefined) {
      const q = data.columns, parts = [q.id, q.video, q.question, q.answer, ...data.runs.map((r) => r.columns.said)];
      texts[i] = parts.map((column) => cell(column, i)).join("\n").toLowerCase();
    }
    return texts[i];
  }

  function question(i) {
    const one = row(data.columns, i);
    one.runs = data.runs.map((run) => (cell(run.columns.status, i) ? row(run.columns, i) : null));
    return one;
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function choose() {
    const run = Number(of.value), words = search.value.toLowerCase().trim();
    found = orderOf(run).filter((i) =>
      (!status.value || cell(data.runs[run].columns.status, i) === status.value) &&
      (!category.value || String(cell(data.columns.category, i)) === category.value) &&
      (!words || textOf(i).includes(words)));
    first = 0;
    draw();
  }

  function draw() {
    const shown = found.slice(first, first + PAGE);
    list.replaceChildren(...shown.map((i) => item(question(i), Number(of.value))));
    count.textContent = `${found.length} of ${data.count} questions`;
    place.textContent = found.length ? `${first + 1} to ${first + shown.length} of ${found.length}` : "none";
    previous.disabled = first === 0;
    next.disabled = first + PAGE >= found.length;
  }

  function item(q, run) {
    const box = element("article", `question ${q.runs[run].status}`);
    box.dataset.id = q.id;
    box.append(element("h3", "", q.question || "(no question)"));
    box.append(element("div", "about", [q.id, q.video && `video ${q.video}`, q.category].filter(Boolean).join(" · ")));
    box.append(said("answer", q.answer == null ? "(hidden)" : q.answer));
    if (q.options) box.append(said("options", q.options.join(" | ")));
    box.append(oneRun(q.runs[run], data.runs[run]));
    const others = q.runs.map((_, i) => i).filter((i) => i !== run && q.runs[i]);
    if (others.length) {
      const more = element("details");
      const words = others.map((i) => `${data.runs[i].letter} ${q.runs[i].status}`).join(", ");
      more.append(element("summary", "faint", `other evaluations: ${words}`));
      for (const i of others) more.append(oneRun(q.runs[i], data.runs[i]));
      box.append(more);
    }
    return box;
  }

  function said(label, text) {
    const line = element("p", "said");
    line.append(element("span", "faint", `${label}: `), document.createTextNode(text));
    return line;
  }

  function oneRun(one, run) {
    const box = element("div", "run");
    const line = element("p", "said");
    line.append(element("span", `badge ${one.status}`, one.status));
    if (data.runs.length > 1) line.append(element("span", "faint", `${run.letter}, ${run.name}: `));
    line.append(document.createTextNode(one.said === "" ? "(said nothing)" : one.said));
    box.append(line);
    if (one.facts) box.append(element("div", "about", one.facts));
    if (one.frames || one.span) box.append(timeline(one));
    if (one.pictures) box.append(frames(one));
    else if (one.times && one.times.length) {
      box.append(element("div", "about", `frames at ${one.times.join(", ")} s; no pictures of them here`));
    }
    return box;
  }

  function timeline(one) {
    const edges = [...(one.span || []), ...(one.gold || []), ...(one.frames || []).map((f) => f + 1)];
    const length = one.length || Math.max(1, ...edges);
    const track = element("div", "track");
    const words = [`${length} frames${one.length ? "" : " at least"}`];
    const bar = (className, span) => {
      const part = element("div", className);
      part.style.left = `${(100 * span[0]) / length}%`;
      part.style.width = `max(2px, ${(100 * (span[1] - span[0])) / length}%)`;
      track.append(part);
    };
    if (one.span) {
      bar("predicted", one.span);
      words.push(`span ${one.span[0]} to ${one.span[1]}${one.seconds ? ` (${one.seconds[0]} to ${one.seconds[1]} s)` : ""}`);
    }
    if (one.gold) {
      bar("gold", one.gold);
      words.push(`gold ${one.gold[0]} to ${one.gold[1]}`);
    }
    for (const frame of one.frames || []) {
      const mark = element("div", "mark");
      mark.style.left = `${(100 * (frame + 0.5)) / length}%`;
      track.append(mark);
    }
    if (one.frames && one.frames.length) words.push(`chosen ${one.frames.join(", ")}`);
    track.setAttribute("role", "img");
    track.setAttribute("aria-label", words.join("; "));
    const box = element("div");
    box.append(track, element("div", "about", words.join("; ")));
    return box;
  }

  function frames(one) {
    const row = element("ul", "frames");
    one.pictures.forEach((picture, i) => {
      if (picture < 0) return;
      const cell = element("li"), image = element("img");
      image.src = data.pictures[picture];
      image.alt = `frame at ${one.times[i]} s`;
      cell.append(image, document.createTextNode(`${one.times[i]} s`));
      row.append(cell);
    });
    return row;
  }

  for (const control of [of, status, category]) control.addEventListener("change", choose);
  search.addEventListener("input", choose);
  const turn = (by) => { first += by; draw(); byId("questions").scrollIntoView(); };
  previous.addEventListener("click", () => turn(-PAGE));
  next.addEventListener("click", () => turn(PAGE));
  byId("browser").hidden = false;
  choose();
})();
