// Runs the report's program on a document of a few lines, and prints what a person would read.
// Usage: node page_in_node.js REPORT.html; prints JSON: texts of the page, tags that were made,
// points of paths, and what was pressed.
"use strict";
const page = require("fs").readFileSync(process.argv[2], "utf-8");
const VOID = new Set(["meta", "link", "input", "br"]);
const made = {};

class Node {
  constructor(tag) {
    this.tagName = tag; this.attributes = {}; this.children = []; this.parentElement = null;
    this.style = {}; this.listeners = {}; this.clientWidth = 900; this.offsetWidth = 100;
    this.hidden = false; this.value = ""; made[tag] = (made[tag] ?? 0) + 1;
    this.dataset = new Proxy(this, {
      get: (node, key) => node.attributes[`data-${key}`],
      set: (node, key, value) => { node.attributes[`data-${key}`] = String(value); return true; },
      deleteProperty: (node, key) => delete node.attributes[`data-${key}`],
    });
    this.classList = { contains: (name) => this.className.split(" ").includes(name) };
  }
  get className() { return this.attributes.class ?? ""; }
  set className(value) { this.attributes.class = value; }
  get firstChild() { return this.children[0]; }
  get textContent() { return this.children.map((c) => (typeof c === "string" ? c : c.textContent)).join(""); }
  set textContent(value) { this.children = [String(value)]; }
  setAttribute(key, value) {
    this.attributes[key] = String(value);
    if (key === "value") this.value = String(value);
    if (key === "hidden") this.hidden = true;
  }
  remove() { const all = this.parentElement?.children; if (all) all.splice(all.indexOf(this), 1); }
  append(...nodes) {
    for (const node of nodes) {
      if (typeof node !== "string") { node.remove(); node.parentElement = this; }
      this.children.push(node);
    }
  }
  before(node) {
    node.remove(); node.parentElement = this.parentElement;
    this.parentElement.children.splice(this.parentElement.children.indexOf(this), 0, node);
  }
  replaceChildren(...nodes) { this.children = []; this.append(...nodes); }
  addEventListener(kind, listener) { (this.listeners[kind] ??= []).push(listener); }
  fire(kind) { for (const listener of this.listeners[kind] ?? []) listener({}); }
  all() { return this.children.flatMap((c) => (typeof c === "string" ? [] : [c, ...c.all()])); }
  querySelectorAll(wanted) {
    return this.all().filter((n) => (wanted[0] === "." ? n.classList.contains(wanted.slice(1)) : n.tagName === wanted));
  }
  querySelector(wanted) { return this.querySelectorAll(wanted)[0] ?? null; }
}

function parsed(html) {
  const root = new Node("root");
  let at = root;
  for (const [, close, tag, rest, text] of html.matchAll(/<(\/?)([a-zA-Z0-9]+)((?:[^>"]|"[^"]*")*)>|([^<]+)/g)) {
    if (text !== undefined) { at.append(text); continue; }
    if (close) { at = at.parentElement; continue; }
    const node = new Node(tag);
    for (const [, key, , value] of rest.matchAll(/([a-zA-Z-]+)(="([^"]*)")?/g)) node.setAttribute(key, value ?? "");
    at.append(node);
    if (!VOID.has(tag) && !rest.endsWith("/")) at = node;
  }
  return root;
}

const [, body] = page.match(/<body>([\s\S]*?)<script type="application\/json"/);
const root = parsed(body), held = new Node("script"), html = new Node("html");
held.textContent = page.match(/<script type="application\/json" id="data">([\s\S]*?)<\/script>/)[1];
globalThis.document = {
  documentElement: html, title: "",
  createElement: (tag) => new Node(tag), createElementNS: (_, tag) => new Node(tag),
  getElementById: (id) => (id === "data" ? held : root.all().find((n) => n.attributes.id === id)),
  querySelector: (wanted) => root.querySelector(wanted), querySelectorAll: (wanted) => root.querySelectorAll(wanted),
};
globalThis.matchMedia = () => ({ matches: false, addEventListener() {} });
globalThis.ResizeObserver = class { observe() {} };
for (const tag of Object.keys(made)) delete made[tag];
new Function(page.slice(page.lastIndexOf("<script>") + 8, page.lastIndexOf("</script>")))();

const shown = (node) => node && !node.hidden && (node.parentElement === null || shown(node.parentElement));
const find = (id) => document.getElementById(id);
const texts = (wanted) => root.querySelectorAll(wanted).filter(shown).map((n) => n.textContent);
const told = () => ({
  heads: texts("h2"), columns: texts("th"), cells: texts("td"), samples: texts(".sample"),
  tokens: root.querySelectorAll(".token").map((n) => [n.textContent, n.style.backgroundColor ?? ""]),
  given: texts(".given"), marks: texts(".mark-note"),
  charts: root.querySelectorAll(".chart").map((n) => [n.attributes["data-column"] ?? "timeline", n.querySelectorAll("path").filter((p) => p.attributes.d).length]),
  broken: root.all().filter((n) => Object.values(n.attributes).some((v) => /NaN|undefined/.test(v))).map((n) => n.tagName),
});
const first = told();
find("tint").value = "probability"; find("tint").fire("change");
const tinted = told().tokens;
if (find("at").children.length) { find("at").value = "all"; find("at").fire("change"); }
const all = told().samples;
find("log").fire("click");
console.log(JSON.stringify({ ...first, tinted, all, made }));
