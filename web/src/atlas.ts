/**
 * Sprite sheets for other tools: sheet.png, and the file in which a tool reads where each sprite lies. The same text as
 * pokediff/drawing/atlas.py writes, which describes the formats.
 */

import { grid, roundEven, type Picture } from "./pictures";

/** One or several frames of a size, and how many milliseconds each is shown. */
export interface Sprite {
  name: string; // unique in its sheet, with a letter or hyphen: JSON.stringify would move a number to the front
  prompt: string;
  seed: number;
  frames: readonly Picture[];
  ms: readonly number[];
}

interface Cell {
  sprite: Sprite;
  name: string;
  x: number; // px
  y: number;
  ms: number;
}

interface Layout {
  cells: Cell[];
  sprites: { sprite: Sprite; rows: number[] }[]; // with the positions of its cells
  side: number; // px of a cell
  columns: number;
  width: number; // px of the sheet
  height: number;
  version: string; // of pokediff
}

export const IMAGE = "sheet.png";
export const STILL_MS = 125; // of a picture that stands alone
const GAP = 2; // transparent px between cells, so that an engine that interpolates does not mix neighbours

/** The tools, with their names, files and writers. */
export const TOOLS = {
  aseprite: { title: "Aseprite", file: "sheet.aseprite.json", write: aseprite },
  texturepacker: { title: "Phaser, PixiJS (TexturePacker)", file: "sheet.texturepacker.json", write: texturepacker },
  godot: { title: "Godot 4", file: "sheet.tres", write: godot },
  tiled: { title: "Tiled", file: "sheet.tsx", write: tiled },
};
export type Tool = keyof typeof TOOLS;

/**
 * The sheet and its file's text for a tool: a row for each animation, or a square of single pictures. Throws RangeError
 * for no sprites, and for frames of several sizes.
 */
export function makeSheet(sprites: readonly Sprite[], tool: Tool, version: string): { sheet: Picture; text: string } {
  const longest = Math.max(...sprites.map(({ frames }) => frames.length));
  const columns = longest > 1 ? longest : Math.max(1, roundEven(Math.sqrt(sprites.length)));
  const sheet = grid(sprites.flatMap(({ frames }) => frames), columns, GAP); // prettier-ignore
  const side = sprites[0].frames[0].width;
  const layout: Layout = { cells: [], sprites: [], side, columns, width: sheet.width, height: sheet.height, version };
  for (const sprite of sprites) {
    const rows: number[] = [];
    sprite.frames.forEach((_, frame) => {
      const index = layout.cells.length;
      const [x, y] = [(index % columns) * (side + GAP), Math.floor(index / columns) * (side + GAP)];
      const name = sprite.frames.length === 1 ? sprite.name : `${sprite.name}-${String(frame).padStart(2, "0")}`;
      rows.push(index);
      layout.cells.push({ sprite, name, x, y, ms: sprite.ms[frame] });
    });
    layout.sprites.push({ sprite, rows });
  }
  return { sheet, text: TOOLS[tool].write(layout) };
}

/** The same names; those that occur again get -2, -3 ... */
export function uniqueNames(names: readonly string[]): string[] {
  const seen = new Map<string, number>();
  return names.map((name) => {
    const number = (seen.get(name) ?? 0) + 1;
    seen.set(name, number);
    return number === 1 ? name : `${name}-${number}`;
  });
}

// ----------------------------------------------------------------------------------------------------------- the tools

function aseprite(layout: Layout): string {
  const frameTags = layout.sprites.map(({ sprite, rows }) => ({
    name: sprite.name,
    from: rows[0],
    to: rows[rows.length - 1],
    direction: "forward",
    data: sprite.prompt,
  }));
  const frames = layout.cells.map((cell) => ({ filename: cell.name, ...trim(cell, layout.side), duration: cell.ms }));
  return json({ frames, meta: { ...meta(layout), frameTags, layers: [], slices: [] } });
}

function texturepacker(layout: Layout): string {
  const pivot = { x: 0.5, y: 0.5 };
  const frames = layout.cells.map((cell): [string, object] => [cell.name, { ...trim(cell, layout.side), pivot }]);
  const moving = layout.sprites.filter(({ rows }) => rows.length > 1);
  const animations = moving.map(({ sprite, rows }) => [sprite.name, rows.map((row) => layout.cells[row].name)]);
  const meta_ = meta(layout);
  return json({ frames: Object.fromEntries(frames), animations: Object.fromEntries(animations), meta: meta_ });
}

function godot({ cells, sprites, side }: Layout): string {
  const lines = [`[gd_resource type="SpriteFrames" load_steps=${cells.length + 2} format=3]`, ""];
  lines.push(`[ext_resource type="Texture2D" path="${IMAGE}" id="1"]`, "");
  cells.forEach((cell, index) => {
    lines.push(`[sub_resource type="AtlasTexture" id="${index + 1}"]`, 'atlas = ExtResource("1")');
    lines.push(`region = Rect2(${cell.x}, ${cell.y}, ${side}, ${side})`, "");
  });
  const animations = sprites.map(({ sprite, rows }) => {
    const unit = Math.min(...rows.map((row) => cells[row].ms));
    const frames = rows.map(
      (row) => `{"duration": ${short(cells[row].ms / unit)}, "texture": SubResource("${row + 1}")}`,
    );
    const body = `"frames": [${frames.join(", ")}], "loop": ${rows.length > 1}, "name": "${sprite.name}"`;
    return `{${body}, "speed": ${short(1000 / unit)}}`;
  });
  lines.push("[resource]", `animations = [${animations.join(", ")}]`, "");
  return lines.join("\n");
}

function tiled(layout: Layout): string {
  const { cells, columns, side, width, height } = layout;
  const lines = ['<?xml version="1.0" encoding="UTF-8"?>'];
  const sizes = { tilewidth: side, tileheight: side, spacing: GAP, tilecount: cells.length, columns };
  lines.push(`<tileset${attributes({ version: "1.10", name: "pokediff", ...sizes })}>`);
  lines.push(` <image${attributes({ source: IMAGE, width, height })} />`);
  for (const { sprite, rows } of layout.sprites) {
    lines.push(` <tile${attributes({ id: rows[0] })}>`, "  <properties>");
    const properties = { name: sprite.name, prompt: sprite.prompt, seed: sprite.seed };
    for (const [name, value] of Object.entries(properties)) lines.push(`   <property${attributes({ name, value })} />`);
    lines.push("  </properties>");
    if (rows.length > 1) {
      lines.push("  <animation>");
      for (const row of rows) lines.push(`   <frame${attributes({ tileid: row, duration: cells[row].ms })} />`);
      lines.push("  </animation>");
    }
    lines.push(" </tile>");
  }
  lines.push("</tileset>", "");
  return lines.join("\n");
}

/** Where a frame lies; frames are neither rotated nor trimmed. */
function trim({ x, y }: Cell, side: number): object {
  const size = { w: side, h: side };
  const place = { frame: { x, y, ...size }, rotated: false, trimmed: false };
  return { ...place, spriteSourceSize: { x: 0, y: 0, ...size }, sourceSize: size };
}

function meta({ width, height, version }: Layout): object {
  const size = { w: width, h: height };
  return { app: "pokediff", version, image: IMAGE, format: "RGBA8888", size, scale: "1" };
}

const json = (values: object) => `${JSON.stringify(values, null, 1)}\n`;

/** Four significant digits, as Python's ".4g" writes them: an exact half goes to the even digit. */
export function short(value: number): string {
  const [digits, exponent] = value.toExponential(40).split("e"); // a half has no more digits
  let rounded = value.toExponential(3);
  if (/^\d\.\d\d[02468]50*$/.test(digits)) rounded = `${digits.slice(0, 5)}e${exponent}`;
  const size = Number(rounded.split("e")[1]);
  if (size >= -4 && size < 4) return String(Number(rounded));
  const [sign, places] = [size < 0 ? "-" : "+", String(Math.abs(size)).padStart(2, "0")];
  return `${Number(rounded.split("e")[0])}e${sign}${places}`;
}

const ESCAPES: Record<string, string> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "\r": "&#13;",
  "\n": "&#10;",
  "\t": "&#09;",
};

function attributes(values: Record<string, string | number>): string {
  const escaped = (value: string | number) => String(value).replace(/[&<>"\r\n\t]/g, (letter) => ESCAPES[letter]);
  return Object.entries(values)
    .map(([name, value]) => ` ${name}="${escaped(value)}"`)
    .join("");
}
