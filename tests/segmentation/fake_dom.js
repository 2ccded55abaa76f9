// Runs the script of a report in a document of a few lines, uses it like a person, and prints what
// was seen as JSON. `node fake_dom.js REPORT.html`
const page = require("fs").readFileSync(process.argv[2], "utf-8");

class Element {
  constructor(name) {
    Object.assign(this, { name, children: [], style: {}, className: "", text: "", value: "" });
    const on = this.on = new Set();
    this.classList = { toggle: (key, set) => set ? on.add(key) : on.delete(key) };
  }
  set textContent(text) { this.text = text; this.children = []; }
  get textContent() { return this.text + this.children.map(c => c.textContent ?? c).join(""); }
  append(...more) { this.children.push(...more); }
  replaceChildren(...all) { this.children = all; }
  getContext() {
    return {
      createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }),
      putImageData: picture => { this.pixels = picture.data; },
    };
  }
  all(test) {
    const below = this.children.filter(c => c instanceof Element);
    return [...below.filter(test), ...below.flatMap(c => c.all(test))];
  }
}

const ids = {};
for (const [, id] of page.matchAll(/ id="(\w+)"/g)) ids[id] = new Element(id);
const body = new Element("body");
body.append(...Object.values(ids));
ids.sort.value = "down"; // the first option, as in a browser
globalThis.document = {
  createElement: name => new Element(name),
  getElementById: id => ids[id],
  querySelectorAll: what => what === "canvas" ? body.all(e => e.name === "canvas")
    : ids.classes.children, // "#classes li"
};
const script = page.match(/<script>([\s\S]*?)<\/script>/)[1];
const data = new Function(script + "\nreturn data;")();

const order = () => ids.cards.children.map(card => card.one.index);
const seen = { cards: {} };
for (const how of ["down", "up", "index"]) {
  ids.sort.value = how;
  ids.sort.onchange();
  seen.cards[how] = order();
}
seen.only = {};
for (const option of ids.only.children.filter(o => o instanceof Element)) {
  ids.only.value = String(option.value);
  ids.only.onchange();
  seen.only[option.text] = ids.cards.children.map(card => [card.one.index, card.head.textContent]);
}
ids.only.value = "";
ids.only.onchange();
seen.classes = ids.classes.children.map(item => item.textContent);

// Point at one pixel of each label of the first prediction.
const canvas = body.all(e => e.name === "canvas")[0];
seen.hover = {};
for (const label of new Set(canvas.labels)) {
  const at = canvas.labels.indexOf(label);
  canvas.onmousemove({ offsetX: at % canvas.width + .5, offsetY: Math.floor(at / canvas.width) });
  const other = canvas.labels.findIndex(l => l !== label);
  seen.hover[label] = {
    said: ids.hover.textContent,
    lit: ids.classes.children.filter(item => item.on.has("on")).map(item => item.label),
    color: [...canvas.pixels.slice(4 * at, 4 * at + 3)],
    other: other < 0 ? null : [...canvas.pixels.slice(4 * other, 4 * other + 3)],
  };
}
canvas.onmouseleave();
seen.left = ids.hover.textContent;
seen.labels = canvas.labels.length === canvas.width * canvas.height;
seen.names = data.names;
seen.colors = data.colors;
console.log(JSON.stringify(seen));
