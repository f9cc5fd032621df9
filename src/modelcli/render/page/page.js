"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tree = data.tree;
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  // ---- small helpers: text goes into the page as text alone, never as markup ---------------------------------------

  /** Return a text whose control, format and direction characters are written out, so that a name cannot deceive. */
  const shown = (text) =>
    text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");
  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) if (value !== null) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const draw = (tag, attributes, ...children) => {
    const made = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const exact = (value) => (value === null ? "–" : value.toLocaleString("en-US"));
  const compact = (value) => {
    if (value === null || Math.abs(value) < 10000) return exact(value);
    const rounded = Number(value.toPrecision(3));
    for (const [power, unit] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (rounded >= power) return (rounded / power).toPrecision(3) + unit;
    return exact(value);
  };
  const megabytes = (value) => {
    const rounded = Number(value.toPrecision(3));
    for (const [power, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
      if (rounded >= power) return Number((rounded / power).toPrecision(4)) + " " + unit;
    return value + " B";
  };
  const percent = (part, whole) => {
    if (!whole || part === null) return "–";
    const share = (100 * part) / whole;
    return part && share < 0.01 ? "<0.01 %" : share.toFixed(share < 10 ? 2 : 1) + " %";
  };
  const number = (value) => (typeof value === "number" ? Number(value.toPrecision(4)).toString() : value === null ? "–" : value);

  // ---- the tree: a node is one module or tensor, a run several siblings that look the same --------------------------

  const [TYPE, CONFIG, SHAPE, MACS, RAN, PARAMS, TRAINED, BYTES, DTYPES, SIZE, KIDS, SHARED] = Array(12).keys();
  /** The values of a kind up to a number of them; those that were left out are null. */
  const padded = (kind, count) => Array.from({ length: count }, (_, i) => (i < kind.length ? kind[i] : null));
  tree.tensors = tree.tensors.map((kind) => {
    const [shape, dtype, flags, trained, tied, stored] = padded(kind, 6);
    const elements = shape === null ? 0 : shape.reduce((product, size) => product * size, 1);
    const bytes = stored === null ? elements * tree.sizes[dtype || 0] : stored;
    return [shape === null ? "–" : "[" + shape.join(",") + "]", dtype || 0, elements, bytes, flags || 0, trained, tied];
  });
  {
    const modules = [];
    for (const kind of tree.modules) {
      const [listed, trained, type, config, shape, macs, ran, shared, counted] = padded(kind, 9);
      const kids = [];
      const dtypes = new Map();
      let [params, bytes, size] = [0, 0, 1];
      const add = (child, times) => {
        if (child < 0) {
          const [, dtype, elements, nbytes, flags, , tied] = tree.tensors[-1 - child];
          size += times;
          if (!(flags & 1)) dtypes.set(dtype, (dtypes.get(dtype) || 0) + times * elements);
          if (tied !== null) return;
          bytes += times * nbytes;
          if (!(flags & 1)) params += times * elements;
        } else {
          const below = modules[child];
          params += times * below[PARAMS];
          bytes += times * below[BYTES];
          size += times * below[SIZE];
          below.weights.forEach((elements, dtype) => dtypes.set(dtype, (dtypes.get(dtype) || 0) + times * elements));
        }
      };
      for (let i = 0; i < listed.length; i++) {
        if (Array.isArray(listed[i])) {
          add(listed[i][3], listed[i][2]);
          kids.push(listed[i]);
        } else {
          kids.push(typeof listed[i] === "number" ? tree.names[listed[i]] : listed[i], listed[i + 1]);
          add(listed[++i], 1);
        }
      }
      const order = [...dtypes.keys()].sort((a, b) => dtypes.get(b) - dtypes.get(a));
      const made = [type || 0, config || 0, shape || 0, macs, ran, counted === null ? params : counted, trained, bytes, order, size, kids, shared];
      made.weights = dtypes;
      modules.push(made);
    }
    tree.modules = modules;
    tree.root = modules.length - 1;
  }
  const kindOf = (node) => tree.modules[node.kind];
  const tensorOf = (node) => {
    const [shape, dtype, elements, bytes, flags, trained, tied] = tree.tensors[-1 - node.kind];
    return { shape, dtype, elements, bytes, buffer: flags & 1, unsaved: flags & 2, trained, tied };
  };
  const isModule = (node) => node.kind >= 0;
  const sizeOf = (kind) => (kind < 0 ? 1 : tree.modules[kind][SIZE]);
  const lastOf = (node) => node.id + (node.run ? node.run.count : 1) * sizeOf(node.kind);
  const join = (path, name) => (path ? path + "." + name : name);
  const root = { id: 0, kind: tree.root, name: ".", path: "", parent: null, level: 1 };

  const below = (node) => {
    if (node.kids) return node.kids;
    node.kids = [];
    if (node.run) {
      for (let i = 0; i < node.run.count; i++) {
        const name = node.run.prefix + (node.run.first + i);
        const id = node.id + i * sizeOf(node.kind);
        node.kids.push({ id, kind: node.kind, name, path: join(node.parent.path, name), parent: node, level: node.level + 1 });
      }
    } else if (isModule(node)) {
      const listed = kindOf(node)[KIDS];
      let id = node.id + 1;
      for (let i = 0; i < listed.length; i++) {
        const child = { id, kind: 0, name: listed[i], path: "", parent: node, level: node.level + 1 };
        if (typeof listed[i] === "string") {
          child.kind = listed[++i];
        } else {
          const [prefix, first, count, kind] = listed[i];
          child.run = { prefix, first, count };
          child.name = prefix + "[" + first + "-" + (first + count - 1) + "]";
          child.kind = kind;
        }
        child.path = join(node.path, child.name);
        id = lastOf(child);
        node.kids.push(child);
      }
    }
    return node.kids;
  };
  /** Return the node with this number. */
  const nodeAt = (id) => {
    let node = root;
    while (node.run || node.id !== id) {
      if (node.run) node = below(node)[Math.floor((id - node.id) / sizeOf(node.kind))];
      else {
        const kids = below(node);
        let low = 0;
        let high = kids.length - 1;
        while (low < high) {
          const middle = (low + high + 1) >> 1;
          if (kids[middle].id <= id) low = middle;
          else high = middle - 1;
        }
        node = kids[low];
      }
    }
    return node;
  };
  const typeOf = (node) => tree.types[kindOf(node)[TYPE]];
  const paramsOf = (node) => {
    if (isModule(node)) return kindOf(node)[PARAMS] * (node.run ? node.run.count : 1);
    const tensor = tensorOf(node);
    return tensor.buffer ? 0 : tensor.elements * (node.run ? node.run.count : 1);
  };
  const macsOf = (node) => {
    if (!isModule(node)) return null;
    const macs = kindOf(node)[MACS];
    return macs === null ? null : macs * (node.run ? node.run.count : 1);
  };
  const WORDS = { 0: "frozen", 1: "yes", 2: "partly" };
  const total = { params: data.totals.params, macs: data.totals.macs };
  const typeText = (node) => {
    if (isModule(node)) return (node.run ? node.run.count + " × " : "") + (typeOf(node)[0] || "module");
    const tensor = tensorOf(node);
    const word = (tensor.buffer ? "buffer" : "parameter") + (tensor.tied !== null ? ", tied" : "");
    return (node.run ? node.run.count + " × " : "") + word;
  };
  const shapeText = (node) => {
    if (!isModule(node)) return tensorOf(node).shape;
    return kindOf(node)[RAN] === 0 ? "not called" : tree.shapes[kindOf(node)[SHAPE]] || "–";
  };
  const dtypeText = (node) => {
    if (!isModule(node)) return tree.dtypes[tensorOf(node).dtype];
    const dtypes = kindOf(node)[DTYPES];
    return dtypes.length > 1 ? "mixed" : dtypes.length ? tree.dtypes[dtypes[0]] : "–";
  };
  const trainedOf = (node) => (isModule(node) ? kindOf(node)[TRAINED] : tensorOf(node).trained);
  const changes = new Map((data.changes || []).map(([id, letters, distance]) => [id, { letters, distance }]));
  const values = new Map((data.values || []).map(([id, ...row]) => [id, row]));
  /** The tensors that have NaN or Inf, and the modules above them. */
  const alarms = new Set();
  for (const [id, row] of values)
    if (row[5] || row[6]) for (let node = nodeAt(id); node && !alarms.has(node.id); node = node.parent) alarms.add(node.id);

  // ---- the rows ------------------------------------------------------------------------------------------------------

  const MOST = 200;
  const grid = byId("tree");
  const body = byId("rows");
  const nodes = new WeakMap();
  const rows = new Map();
  const keyOf = (node) => (node.run ? "run" + node.id + "-" + node.kind : "" + node.id);
  let matched = null;
  let selected = null;

  const isMatch = (node) => {
    if (!matched) return false;
    let low = 0;
    let high = matched.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (matched[middle] < node.id) low = middle + 1;
      else high = middle;
    }
    return node.run ? low < matched.length && matched[low] < lastOf(node) : matched[low] === node.id;
  };
  const CHANGED = { A: "added", C: "changed", B: "something below changed" };
  const rowFor = (node, position, count) => {
    const foldable = node.run || (isModule(node) && kindOf(node)[KIDS].length > 0);
    const row = make("div", {
      role: "row", class: "row", tabindex: "-1", "aria-level": node.level, "aria-posinset": position,
      "aria-setsize": count, "aria-expanded": foldable ? "false" : null, "aria-selected": "false",
    });
    const name = make("div", { role: "gridcell", class: "name" });
    name.style.paddingInlineStart = Math.min(node.level - 1, 24) * 0.9 + "rem";
    name.append(make("span", { class: foldable ? "twist" : "twist leaf", "aria-hidden": "true" }));
    name.append(make("span", { class: isModule(node) ? "path" : "path tensor" }, shown(node.name)));
    const change = changes.get(node.id);
    if (change && !node.run)
      name.append(make("span", { class: change.letters === "B" ? "badge below" : "badge", title: CHANGED[change.letters] }, change.letters,
        make("span", { class: "unseen" }, " " + CHANGED[change.letters])));
    if (alarms.has(node.id) && !node.run)
      name.append(make("span", { class: "badge alarmed", title: "has NaN or Inf" }, "!", make("span", { class: "unseen" }, " has NaN or Inf")));
    const params = paramsOf(node);
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.width = total.params ? (100 * params) / total.params + "%" : "0";
    const trained = trainedOf(node);
    const cell = (kind, text, title) => make("div", { role: "gridcell", class: kind, title: title || null }, text);
    row.append(
      name,
      cell("type", shown(typeText(node)), isModule(node) ? shown(tree.configs[kindOf(node)[CONFIG]]) : null),
      cell("shape", shown(shapeText(node))),
      cell("params n", compact(isModule(node) ? params : tensorOf(node).elements), exact(params)),
      make("div", { role: "gridcell", class: "share" }, bar, make("span", { class: "unseen" }, percent(params, total.params))),
      cell("macs n", isModule(node) ? compact(macsOf(node)) : "", exact(macsOf(node))),
      cell("dtype", dtypeText(node)),
      cell("trained", trained === null ? "–" : WORDS[trained]),
    );
    if (trained === 0) row.classList.add("frozen");
    if (isMatch(node)) row.classList.add("match");
    nodes.set(row, node);
    rows.set(keyOf(node), row);
    return row;
  };
  const fill = (container, node, start) => {
    const kids = below(node);
    const end = Math.min(start + MOST, kids.length);
    const made = document.createDocumentFragment();
    for (let i = start; i < end; i++) made.append(rowFor(kids[i], i + 1, kids.length));
    container.append(made);
    if (end < kids.length) {
      const text = "Show " + Math.min(MOST, kids.length - end) + " more of " + exact(kids.length - end);
      const more = make("div", { role: "row", class: "row more", tabindex: "-1", "aria-level": node.level + 1 },
        make("div", { role: "gridcell", class: "name" }, text));
      more.firstChild.style.paddingInlineStart = node.level * 0.9 + "rem";
      more.fill = () => {
        const before = more.previousElementSibling;
        more.remove();
        fill(container, node, end);
        return before;
      };
      container.append(more);
    }
  };
  const kidsOf = (row) => {
    const next = row.nextElementSibling;
    return next && next.classList.contains("kids") ? next : null;
  };
  const isOpen = (row) => row.getAttribute("aria-expanded") === "true";
  const open = (row) => {
    if (!row.hasAttribute("aria-expanded") || isOpen(row)) return;
    row.setAttribute("aria-expanded", "true");
    let kids = kidsOf(row);
    if (kids) {
      kids.hidden = false;
      return;
    }
    kids = make("div", { role: "none", class: "kids" });
    fill(kids, nodes.get(row), 0);
    row.after(kids);
  };
  const fold = (row) => {
    if (!isOpen(row)) return;
    row.setAttribute("aria-expanded", "false");
    const kids = kidsOf(row);
    if (kids.contains(document.activeElement)) focusRow(row);
    kids.hidden = true;
  };
  const rowAbove = (row) => {
    const holder = row.parentElement;
    return holder === body ? null : holder.previousElementSibling;
  };
  const lastRow = (row) => {
    while (isOpen(row)) {
      const kids = kidsOf(row).children;
      let last = kids[kids.length - 1];
      if (last.classList.contains("kids")) last = last.previousElementSibling;
      row = last;
    }
    return row;
  };
  const nextRow = (row) => {
    if (isOpen(row)) return kidsOf(row).firstElementChild;
    while (row) {
      let next = row.nextElementSibling;
      if (next && next.classList.contains("kids")) next = next.nextElementSibling;
      if (next) return next;
      row = rowAbove(row);
    }
    return null;
  };
  const rowBefore = (row) => {
    let before = row.previousElementSibling;
    if (!before) return rowAbove(row);
    if (before.classList.contains("kids")) before = before.previousElementSibling;
    return lastRow(before);
  };
  let roving = null;
  const focusRow = (row, quietly) => {
    if (roving) roving.tabIndex = -1;
    roving = row;
    row.tabIndex = 0;
    if (!quietly) row.focus();
  };
  /** Open what lies above a node, and return its row. */
  const reveal = (node) => {
    const above = [];
    for (let each = node; each; each = each.parent) above.unshift(each);
    let row = null;
    for (const each of above) {
      if (row) open(row);
      row = rows.get(keyOf(each));
      if (!row) {
        const holder = kidsOf(rows.get(keyOf(each.parent)));
        while (!row) {
          holder.lastElementChild.fill();
          row = rows.get(keyOf(each));
        }
      }
    }
    return row;
  };
  const select = (node) => {
    const row = reveal(node);
    if (selected) selected.setAttribute("aria-selected", "false");
    selected = row;
    row.setAttribute("aria-selected", "true");
    focusRow(row, true);
    describe(node);
    for (const map of maps) map.mark();
    return row;
  };

  grid.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (!row || !body.contains(row)) return;
    if (row.fill) return focusRow(row.fill());
    const node = nodes.get(row);
    if (event.target.classList.contains("twist") && row.hasAttribute("aria-expanded")) {
      isOpen(row) ? fold(row) : open(row);
      focusRow(row);
      return;
    }
    if (selected === row) isOpen(row) ? fold(row) : open(row);
    else if (!isOpen(row)) open(row);
    select(node).focus();
  });
  grid.addEventListener("keydown", (event) => {
    const row = event.target.closest(".row");
    if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
    let to = null;
    switch (event.key) {
      case "ArrowDown": to = nextRow(row); break;
      case "ArrowUp": to = rowBefore(row); break;
      case "ArrowRight": isOpen(row) ? (to = nextRow(row)) : open(row); break;
      case "ArrowLeft": isOpen(row) ? fold(row) : (to = rowAbove(row)); break;
      case "Home": to = body.firstElementChild; break;
      case "End": to = lastRow(body.firstElementChild); break;
      case "Enter": case " ":
        if (row.fill) to = row.fill();
        else select(nodes.get(row));
        break;
      default: return;
    }
    event.preventDefault();
    if (to) {
      focusRow(to);
      if (nodes.has(to)) hover(nodes.get(to));
    }
  });
  grid.addEventListener("pointerover", (event) => {
    const row = event.target.closest(".row");
    if (row && nodes.has(row)) hover(nodes.get(row));
  });
  grid.addEventListener("pointerleave", () => hover(null));
  const UNFOLDED = 2000;
  byId("unfold").addEventListener("click", () => {
    const queue = [body.firstElementChild];
    let next = 0;
    for (; next < queue.length && queue.length < UNFOLDED; next++) {
      const row = queue[next];
      if (!row.hasAttribute("aria-expanded")) continue;
      open(row);
      for (const each of kidsOf(row).children) if (nodes.has(each)) queue.push(each);
    }
    const all = queue.slice(next).every((row) => !row.hasAttribute("aria-expanded") || isOpen(row));
    say(all ? "" : "More than " + exact(UNFOLDED) + " rows: unfold the rest where you need it, or search.");
  });
  byId("fold").addEventListener("click", () => {
    const first = body.firstElementChild;
    const kids = kidsOf(first);
    if (kids) {
      if (kids.contains(document.activeElement) || kids.contains(roving)) focusRow(first, true);
      for (const key of [...rows.keys()]) if (kids.contains(rows.get(key))) rows.delete(key);
      if (selected && kids.contains(selected)) selected = null;
      kids.remove();
      first.setAttribute("aria-expanded", "false");
    }
    open(first);
    say("");
  });
  const say = (text) => { byId("said").textContent = text; };

  // ---- the treemaps ------------------------------------------------------------------------------------------------

  const CELLS = 600;
  const familyOf = (dtype) => data.families[dtype];
  const looksOf = (node) => {
    if (!isModule(node)) {
      const tensor = tensorOf(node);
      return tensor.trained === 0 ? "frozen" : familyOf(tensor.dtype);
    }
    const kind = kindOf(node);
    if (!kind[DTYPES].length) return "none";
    if (kind[TRAINED] === 0) return "frozen";
    return kind[DTYPES].length > 1 ? "mixed" : familyOf(kind[DTYPES][0]);
  };
  /** Place items, each with a value above 0, in a rectangle: M. Bruls, K. Huizing, J. J. van Wijk, "Squarified Treemaps", 2000. */
  const squarify = (items, x, y, width, height) => {
    const left = items.slice().sort((a, b) => b.value - a.value);
    const sum = left.reduce((all, item) => all + item.value, 0);
    const scale = (width * height) / sum;
    const placed = [];
    let start = 0;
    while (start < left.length && width > 0 && height > 0) {
      const side = Math.min(width, height);
      let end = start;
      let area = 0;
      let worst = Infinity;
      const largest = left[start].value * scale;
      while (end < left.length) {
        const next = left[end].value * scale;
        const grown = area + next;
        const ratio = Math.max((side * side * largest) / (grown * grown), (grown * grown) / (side * side * next));
        if (ratio > worst) break;
        worst = ratio;
        area = grown;
        end++;
      }
      const thick = Math.min(area / side, width >= height ? width : height);
      let along = 0;
      for (let i = start; i < end; i++) {
        const length = (left[i].value * scale) / thick;
        placed.push(
          width >= height
            ? { item: left[i], x, y: y + along, width: thick, height: length }
            : { item: left[i], x: x + along, y, width: length, height: thick },
        );
        along += length;
      }
      if (width >= height) { x += thick; width -= thick; }
      else { y += thick; height -= thick; }
      start = end;
    }
    return placed;
  };
  /** Return what a node is divided into: its children, and its own share where it has one beside them. */
  const partsOf = (node, valueOf, own) => {
    const parts = [];
    let rest = 0;
    for (const child of below(node)) {
      if (!isModule(child)) {
        const tensor = tensorOf(child);
        if (own && !tensor.buffer && tensor.tied === null) rest += tensor.elements * (child.run ? child.run.count : 1);
        continue;
      }
      const several = child.run && child.run.count <= CELLS ? below(child) : [child];
      for (const each of several) {
        const value = valueOf(each);
        if (value > 0) parts.push({ node: each, value });
      }
    }
    if (!own) rest = Math.max((valueOf(node) || 0) - parts.reduce((all, part) => all + part.value, 0), 0);
    if (rest > 0 && parts.length) parts.push({ node, value: rest, own: true });
    return parts;
  };
  class Treemap {
    constructor(element, valueOf, whole, unit, own) {
      Object.assign(this, { element, valueOf, whole, unit, own, top: root, cells: [], active: -1 });
      element.addEventListener("pointerover", (event) => {
        const found = this.cellOf(event.target);
        if (found) hover(found.node, found.own);
      });
      element.addEventListener("pointerleave", () => hover(null));
      element.addEventListener("click", (event) => {
        const found = this.cellOf(event.target);
        if (found) {
          this.activate(this.cells.indexOf(found));
          select(found.node).scrollIntoView({ block: "nearest" });
        }
      });
      element.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const last = this.cells.length - 1;
        if (step) this.activate(Math.min(Math.max(this.active + step, 0), last));
        else if (event.key === "Home") this.activate(0);
        else if (event.key === "End") this.activate(last);
        else if ((event.key === "Enter" || event.key === " ") && this.active >= 0)
          select(this.cells[this.active].node).scrollIntoView({ block: "nearest" });
        else return;
        event.preventDefault();
      });
      element.addEventListener("focus", () => this.activate(Math.max(this.active, 0)));
    }
    cellOf(target) {
      const group = target.closest("[data-cell]");
      return group ? this.cells[Number(group.dataset.cell)] : null;
    }
    activate(index) {
      const before = this.cells[this.active];
      if (before) before.group.classList.remove("active");
      const cell = this.cells[index];
      if (!cell) return;
      this.active = index;
      cell.group.classList.add("active");
      this.element.setAttribute("aria-activedescendant", cell.group.id);
      hover(cell.node, cell.own);
    }
    render() {
      const width = this.element.clientWidth;
      const height = this.element.clientHeight;
      if (!width || !height) return;
      this.element.setAttribute("viewBox", "0 0 " + width + " " + height);
      this.element.replaceChildren();
      this.cells = [];
      this.active = -1;
      this.element.removeAttribute("aria-activedescendant");
      const pending = [{ node: this.top, x: 0, y: 0, width, height, depth: 0 }];
      // The largest are divided first, so that a limit on the cells leaves the small ones whole.
      while (pending.length) {
        const box = pending.shift();
        const parts = box.own ? [] : partsOf(box.node, this.valueOf, this.own);
        const area = box.width * box.height;
        const count = this.cells.length + pending.length + parts.length;
        const divides = parts.length > 0 && area > 220 && area / parts.length > 16 && count < CELLS;
        if (!divides) {
          this.cell(box);
          continue;
        }
        const inset = box.depth && parts.length > 1 ? 1 : 0;
        const head = box.depth && parts.length > 1 && box.width > 64 && box.height > 44 ? 14 : 0;
        if (head) this.head(box);
        const inner = [box.x + inset, box.y + inset + head, box.width - 2 * inset, box.height - 2 * inset - head];
        for (const { item, ...place } of squarify(parts, ...inner))
          pending.push({ ...place, node: item.node, own: item.own, depth: box.depth + 1 });
      }
      this.mark();
    }
    label(text, width) {
      const fits = Math.floor((width - 7) / 6.9);
      return text.length <= fits ? text : fits < 8 ? "" : text.slice(0, fits - 1) + "…";
    }
    head(box) {
      const text = this.label(shown(box.node.name), box.width);
      this.element.append(draw("text", { class: "head", x: box.x + 4, y: box.y + 11.5, "aria-hidden": "true" }, text));
    }
    cell(box) {
      if (box.width < 0.6 || box.height < 0.6) return;
      const gap = Math.min(1, box.width / 4, box.height / 4);
      const place = {
        x: box.x + gap / 2, y: box.y + gap / 2, width: Math.max(box.width - gap, 0.3), height: Math.max(box.height - gap, 0.3),
      };
      const looks = looksOf(box.node);
      const value = this.valueOf(box.node);
      const group = draw("g", {
        role: "option", id: this.element.id + "-" + this.cells.length, "data-cell": this.cells.length, "aria-selected": "false",
        class: "cell " + looks,
        "aria-label": shown(box.node.path || ".") + (box.own ? " itself" : "") + ", " + shown(typeText(box.node)) + ", " +
          exact(value) + " " + this.unit + ", " + percent(value, this.whole) + ", " + looks,
      });
      group.append(draw("rect", { ...place, class: "fill" }), draw("rect", { ...place, class: "over" }));
      this.element.append(group, ...this.texts(box, value, looks));
      this.cells.push({ group, node: box.node, own: box.own });
    }
    /** Return what is written on a cell. It is apart from the cell, whose name says more. */
    texts(box, value, looks) {
      if (box.height <= 15) return [];
      const name = shown(box.own ? "(own)" : box.node.name);
      const type = isModule(box.node) && !box.own ? shown(typeOf(box.node)[0] || "") : "";
      const both = this.label(name + " " + type, box.width);
      const first = type && both && !both.endsWith("…") ? both : this.label(name, box.width);
      if (!first) return [];
      const written = draw("g", { class: "written " + looks, "aria-hidden": "true" });
      written.append(draw("text", { x: box.x + 4, y: box.y + 12.5 }, first));
      const second = box.height > 30 ? this.label(compact(value), box.width) : "";
      if (second && !second.endsWith("…")) written.append(draw("text", { x: box.x + 4, y: box.y + 25, class: "small" }, second));
      return [written];
    }
    /** Mark the cells of the selection and of what was found. */
    mark() {
      const chosen = selected ? nodes.get(selected) : null;
      for (const cell of this.cells) {
        const inside = chosen && chosen !== root && cell.node.id >= chosen.id && cell.node.id < lastOf(chosen);
        cell.group.classList.toggle("chosen", Boolean(inside));
        cell.group.setAttribute("aria-selected", inside ? "true" : "false");
        cell.group.classList.toggle("match", Boolean(matched) && isFound(cell.node));
      }
    }
    light(node) {
      for (const cell of this.cells)
        cell.group.classList.toggle(
          "lit", Boolean(node) && node !== root && cell.node.id >= node.id && cell.node.id < lastOf(node));
    }
  }
  /** Whether a node, or one above it, was found. */
  const isFound = (node) => {
    for (let each = node; each; each = each.parent) if (!each.run && isMatch(each)) return true;
    return false;
  };
  const maps = [];
  for (const [id, valueOf, whole, unit, own] of [
    ["map-params", paramsOf, total.params, "parameters", true],
    ["map-macs", macsOf, total.macs, "mult-adds", false],
  ]) {
    const element = byId(id);
    if (element) maps.push(new Treemap(element, valueOf, whole, unit, own));
  }
  let lit = null;
  const hover = (node, own) => {
    if (lit) lit.classList.remove("lit");
    lit = null;
    for (const map of maps) map.light(node);
    const line = byId("hovered");
    if (!node) {
      line.textContent = " ";
      return;
    }
    for (let each = node; each; each = each.parent) {
      const row = rows.get(keyOf(each));
      if (row && row.offsetParent) {
        lit = row;
        row.classList.add("lit");
        break;
      }
    }
    const macs = macsOf(node);
    line.textContent = shown(node.path || ".") + (own ? " (own)" : "") + "  ·  " + shown(typeText(node)) + "  ·  " +
      compact(paramsOf(node)) + " parameters (" + percent(paramsOf(node), total.params) + ")" +
      (macs === null || total.macs === null ? "" : "  ·  " + compact(macs) + " mult-adds (" + percent(macs, total.macs) + ")");
  };
  let zoomed = null;
  byId("zoom").addEventListener("click", () => {
    const node = selected ? nodes.get(selected) : null;
    zoomed = zoomed || !node || node === root || !isModule(node) || node.run ? null : node;
    for (const map of maps) {
      map.top = zoomed || root;
      map.render();
    }
    byId("zoom").textContent = zoomed ? "Show the whole model" : "Zoom to the selection";
    byId("zoomed").textContent = zoomed ? shown(zoomed.path) : "whole model";
  });

  // ---- the details of one node -----------------------------------------------------------------------------------------

  const pair = (list, term, text) => {
    if (text === null || text === "") return;
    list.append(make("dt", {}, term), make("dd", {}, text));
  };
  const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
  const bins = (text) => [...text].map((c) => DIGITS.indexOf(c));
  const histogram = (row, name) => {
    const [low, high, , , , , , text, left, right] = row;
    if (!text) return "";
    const heights = bins(text);
    const most = Math.max(...heights, 1);
    const width = 320;
    const svg = draw("svg", {
      class: "histogram", viewBox: "0 0 " + width + " 64", preserveAspectRatio: "none", role: "img",
      "aria-label": "Histogram of " + shown(name) + " from " + number(left) + " to " + number(right),
    });
    heights.forEach((height, i) => {
      const tall = (60 * height) / most;
      svg.append(draw("rect", { x: (i * width) / heights.length + 0.5, y: 62 - tall, width: width / heights.length - 1, height: tall }));
    });
    svg.append(draw("path", { d: "M0 62.5H" + width, class: "axis" }));
    return make("figure", {}, svg, make("figcaption", {}, make("span", {}, number(left)), make("span", {}, number(right))));
  };
  const statistics = (node) => {
    const row = values.get(node.id);
    if (!row) return "";
    const [low, high, mean, std, zeros, nan, inf] = row;
    const list = make("dl", { class: "facts" });
    pair(list, "range", number(low) + " … " + number(high));
    pair(list, "mean, std", number(mean) + ", " + number(std));
    pair(list, "zeros", exact(zeros) + " (" + percent(zeros, tensorOf(node).elements) + ")");
    pair(list, "NaN, Inf", exact(nan) + ", " + exact(inf));
    if (nan || inf) list.classList.add("alarm");
    return make("div", {}, histogram(row, node.path), list);
  };
  const describe = (node) => {
    const panel = byId("details");
    const list = make("dl", { class: "facts" });
    pair(list, "type", shown(typeText(node)));
    if (isModule(node)) {
      const kind = kindOf(node);
      pair(list, "configuration", shown(tree.configs[kind[CONFIG]]));
      pair(list, "output shape", shown(shapeText(node)));
      pair(list, "parameters", exact(paramsOf(node)) + " (" + percent(paramsOf(node), total.params) + ")");
      if (macsOf(node) !== null) pair(list, "mult-adds", exact(macsOf(node)) + " (" + percent(macsOf(node), total.macs) + ")");
      pair(list, "size", megabytes(kind[BYTES] * (node.run ? node.run.count : 1)));
      pair(list, "dtypes", kind[DTYPES].map((dtype) => tree.dtypes[dtype]).join(", "));
      if (kind[SHARED] !== null) pair(list, "same module as", shown(tree.names[kind[SHARED]]));
    } else {
      const tensor = tensorOf(node);
      pair(list, "shape", tensor.shape);
      pair(list, "elements", exact(tensor.elements));
      pair(list, "size", megabytes(tensor.bytes));
      pair(list, "dtype", tree.dtypes[tensor.dtype]);
      if (tensor.unsaved) pair(list, "saved", "no: it is not in the state dict");
      if (tensor.tied !== null) pair(list, "tied to", shown(tree.names[tensor.tied]));
    }
    const trained = trainedOf(node);
    pair(list, "trainable", trained === null ? "" : { 0: "no, frozen", 1: "yes", 2: "partly" }[trained]);
    const change = node.run ? null : changes.get(node.id);
    if (change) pair(list, "compared", CHANGED[change.letters] + (change.distance === null ? "" : ", relative L2 " + number(change.distance)));
    const shownValues = [];
    if (!node.run) {
      if (!isModule(node)) shownValues.push(statistics(node));
      else
        for (const child of below(node).filter((each) => !isModule(each) && !each.run && values.has(each.id)).slice(0, 6))
          shownValues.push(make("h4", {}, shown(child.name)), statistics(child));
    }
    panel.replaceChildren(make("h3", {}, shown(node.path || ".")), list, ...shownValues);
  };

  // ---- selectors, as on the command line -------------------------------------------------------------------------------

  const MAX_LENGTH = 4096;
  class Refused extends Error {}
  const walkText = (text, at) => {
    let depth = 0;
    let skip = false;
    for (let i = 0; i < text.length; i++) {
      const c = text[i];
      if (skip) skip = false;
      else if (c === "\\") skip = true;
      else if (c === "[" || c === "{") depth++;
      else if (c === "]" || c === "}") depth--;
      else if (depth === 0) at(c, i);
    }
  };
  /** Return the tokens of a component, given as its characters, and where they end. */
  const readTokens = (text, position, depth) => {
    const tokens = [];
    while (position < text.length) {
      const c = text[position];
      if (depth && (c === "," || c === "}")) break;
      position++;
      if (c === "\\") {
        if (position === text.length) throw new Refused("ends in a backslash");
        tokens.push({ letter: text[position++] });
      } else if (c === "*") {
        if (text[position] === "*") throw new Refused("** matches whole components: write **.name or name.**");
        tokens.push({ any: true });
      } else if (c === "?") tokens.push({ one: true });
      else if (c === "[") {
        const end = text.indexOf("]", position);
        if (end < 0) throw new Refused("[ without ]");
        const inside = text.slice(position, end).join("");
        const spans = inside.split(",").map((piece) => {
          const found = /^\s*(\d{1,9})(?:-(\d{1,9}))?\s*$/.exec(piece);
          if (!found) throw new Refused("[" + inside + "] is not a range of numbers");
          const span = [Number(found[1]), Number(found[2] || found[1])];
          if (span[1] < span[0]) throw new Refused("the range is empty");
          return span;
        });
        tokens.push({ spans });
        position = end + 1;
      } else if (c === "{") {
        if (depth >= 10) throw new Refused("braces nested too deeply");
        const options = [];
        for (;;) {
          const [option, end] = readTokens(text, position, depth + 1);
          options.push(option);
          if (end === text.length) throw new Refused("{ without }");
          position = end + 1;
          if (text[end] === "}") break;
        }
        tokens.push({ options });
      } else if (c === "]" || c === "}") throw new Refused(c + " without " + (c === "]" ? "[" : "{"));
      else if (c === "." && depth) throw new Refused("{} cannot contain a dot");
      else tokens.push({ letter: c });
    }
    return [tokens, position];
  };
  const ends = (tokens, name, starts) => {
    for (const token of tokens) {
      const next = new Set();
      if (token.any) {
        for (let i = Math.min(...starts); i <= name.length; i++) next.add(i);
      } else if (token.options) {
        for (const option of token.options) for (const end of ends(option, name, starts)) next.add(end);
      } else
        for (const start of starts) {
          if (token.one) {
            if (start < name.length) next.add(start + 1);
          } else if (token.spans) {
            const digits = /^(?:0|[1-9]\d{0,8})/.exec(name.slice(start, start + 9).join(""));
            for (let end = start + 1; digits && end <= start + digits[0].length; end++) {
              const value = Number(name.slice(start, end).join(""));
              if (token.spans.some(([first, last]) => first <= value && value <= last)) next.add(end);
            }
          } else if (name[start] === token.letter) next.add(start + 1);
        }
      starts = next;
      if (!starts.size) break;
    }
    return starts;
  };
  const parse = (text) => {
    if (text.length > MAX_LENGTH) throw new Refused("too long");
    let colon = -1;
    walkText(text, (c, i) => { if (c === ":") colon = i; });
    const path = colon < 0 ? text : text.slice(0, colon);
    if (!text) throw new Refused("the selector is empty");
    const type = colon < 0 ? null : text.slice(colon + 1);
    if (type !== null && !/^[A-Za-z_*?][\p{L}\p{N}_*?]*$/u.test(type)) throw new Refused("no class has that name: write **:Conv2d");
    if (path === ".") return [{ text, steps: [], type }];
    const dots = [-1];
    walkText(path, (c, i) => { if (c === ".") dots.push(i); });
    dots.push(path.length);
    let parts = path ? dots.slice(1).map((dot, i) => path.slice(dots[i] + 1, dot)) : ["**"];
    let heads = [[]];
    if (parts[0].startsWith("@")) {
      const word = parts[0].slice(1);
      if (word !== "head" && word !== "stem") throw new Refused("there are @head and @stem");
      parts = parts.slice(1);
      heads = (tree.landmarks[word] || []).map((each) => each.split(".").map((name) => ({ exactly: name })));
    }
    const steps = parts.map((part) => {
      if (!part) throw new Refused("an empty component: write it as classifier.6");
      if (part === "**") return { deep: true };
      if (/^-\d{1,9}$/.test(part)) return { fromEnd: Number(part) };
      return { tokens: readTokens([...part], 0, 0)[0], known: new Map() };
    });
    return heads.map((head) => ({ text, steps: [...head, ...steps], type }));
  };
  const fits = (pattern, name) => new RegExp("^" + pattern.replace(/[*?]/g, (c) => (c === "*" ? "[^]*" : "[^]")) + "$", "u").test(name);
  const isSequence = (node) => {
    const type = typeOf(node);
    if (type.length) return type.includes("Sequential") || type.includes("ModuleList");
    let next = 0;
    for (const child of below(node))
      if (isModule(child)) {
        if (child.run ? child.run.prefix !== "" || child.run.first !== next : child.name !== String(next)) return false;
        next += child.run ? child.run.count : 1;
      }
    return next > 0;
  };
  /** Return the node of exactly this path, or null. */
  const called = (path) => {
    let node = root;
    while (node && node.path !== path) {
      const kids = isModule(node) ? below(node).flatMap((child) => (child.run ? below(child) : [child])) : [];
      node = kids.find((child) => child.path === path || path.startsWith(child.path + "."));
    }
    return node || null;
  };
  /** Return the numbers of the modules and tensors that a selector matches, in ascending order. */
  const find = (text) => {
    const found = new Set();
    for (const { steps, type } of parse(text)) {
      const literal = type === null ? called(text) : null;
      if (literal && !isModule(literal)) found.add(literal.id);
      const opened = (states) => {
        const all = new Set();
        for (let state of states) {
          all.add(state);
          while (state < steps.length && steps[state].deep) all.add(++state);
        }
        return all;
      };
      const after = (states, name, fromEnd) => {
        const reached = new Set();
        for (const state of states) {
          const step = steps[state];
          if (!step) continue;
          if (step.deep) reached.add(state);
          else if ("exactly" in step) { if (step.exactly === name) reached.add(state + 1); }
          else if ("fromEnd" in step) { if (step.fromEnd === fromEnd) reached.add(state + 1); }
          else {
            if (!step.known.has(name)) {
              const letters = [...name];
              step.known.set(name, ends(step.tokens, letters, new Set([0])).has(letters.length));
            }
            if (step.known.get(name)) reached.add(state + 1);
          }
        }
        return opened(reached);
      };
      const counts = steps.some((step) => "fromEnd" in step);
      const pending = [[root, opened([0])]];
      while (pending.length) {
        const [node, states] = pending.pop();
        const ok = states.has(steps.length);
        if (ok && (type === null || (isModule(node) && typeOf(node).some((name) => fits(type, name))))) found.add(node.id);
        if (!isModule(node)) continue;
        const kids = below(node).flatMap((child) => (child.run ? below(child) : [child]));
        const modules = counts && isSequence(node) ? kids.filter(isModule) : null;
        let position = 0;
        for (const child of kids) {
          const fromEnd = modules && isModule(child) ? position++ - modules.length : null;
          let reached = states;
          for (const part of child.name.split(".")) reached = reached.size ? after(reached, part, fromEnd) : reached;
          if (reached.size) pending.push([child, reached]);
        }
      }
    }
    return [...found].sort((a, b) => a - b);
  };
  const containing = (text) => {
    const found = [];
    const word = text.toLowerCase();
    const pending = [root];
    while (pending.length) {
      const node = pending.pop();
      if (node.name.toLowerCase().includes(word) && node !== root) found.push(node.id);
      for (const child of below(node)) {
        if (child.run) pending.push(...below(child));
        else pending.push(child);
      }
    }
    return found.sort((a, b) => a - b);
  };
  const field = byId("search");
  let place = -1;
  const counted = (ids) => {
    const modules = ids.filter((id) => isModule(nodeAt(id))).length;
    const tensors = ids.length - modules;
    return exact(modules) + (modules === 1 ? " module" : " modules") + " and " + exact(tensors) + (tensors === 1 ? " tensor" : " tensors");
  };
  const search = () => {
    const text = field.value.trim();
    place = -1;
    let note = "";
    if (!text) matched = null;
    else {
      let why = "no path matches the selector";
      try {
        matched = find(text);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        matched = [];
        why = error.message;
      }
      if (matched.length) note = counted(matched);
      else {
        matched = containing(text);
        note = why + "; " + (matched.length ? counted(matched) + " contain this text" : "no name contains this text");
      }
    }
    for (const row of rows.values()) row.classList.toggle("match", isMatch(nodes.get(row)));
    for (const map of maps) map.mark();
    byId("found").textContent = note;
    byId("next").disabled = byId("previous").disabled = !(matched && matched.length);
    if (matched && matched.length) go(1);
  };
  const go = (step) => {
    if (!matched || !matched.length) return;
    place = (place + step + matched.length) % matched.length;
    select(nodeAt(matched[place])).scrollIntoView({ block: "nearest" });
  };
  let waiting = 0;
  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      if (waiting) { clearTimeout(waiting); waiting = 0; }
      matched && place >= 0 && field.dataset.last === field.value ? go(event.shiftKey ? -1 : 1) : search();
      field.dataset.last = field.value;
    } else if (event.key === "Escape") {
      field.value = "";
      search();
    }
  });
  byId("next").addEventListener("click", () => go(1));
  byId("previous").addEventListener("click", () => go(-1));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName) && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      field.focus();
    }
  });

  // ---- start -----------------------------------------------------------------------------------------------------------

  byId("top").remove();
  for (const hidden of document.querySelectorAll("[data-scripted]")) hidden.hidden = false;
  body.append(rowFor(root, 1, 1));
  const first = body.firstElementChild;
  first.tabIndex = 0;
  roving = first;
  // A small model is shown whole. Of a large one the modules are unfolded level by level, as far as a screen has room.
  const SCREEN = 36;
  const holdsModules = (node) => below(node).some(isModule);
  for (let level = [first], count = 0; level.length; ) {
    const whole = lastOf(root) <= SCREEN;
    const foldable = level.filter((row) => !nodes.get(row).run && (whole ? below(nodes.get(row)).length : holdsModules(nodes.get(row))));
    const kids = foldable.reduce((all, row) => all + below(nodes.get(row)).length, 0);
    count += kids;
    if (!kids || (count > SCREEN && level[0] !== first)) break;
    foldable.forEach(open);
    level = foldable.flatMap((row) => [...kidsOf(row).children].filter((each) => nodes.has(each)));
  }
  if (!isOpen(first)) open(first);
  const start = { find, nodeAt, below, root, paramsOf, macsOf, trainedOf, dtypeText, shapeText, kindOf, isModule, lastOf, maps, select, squarify, rows, open, fold,
    pathOf: (row) => nodes.get(row).path };
  describe(root);
  const render = () => maps.forEach((map) => map.render());
  render();
  let resizing = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(resizing);
    resizing = requestAnimationFrame(render);
  }).observe(byId("maps"));
  globalThis.modelcliPage = start;
})();
