/** Whole pictures and edge cases: scripts/web_picture_values.py, whose inputs these functions draw again. */

import { createHash } from "node:crypto";
import { describe, expect, test } from "vitest";
import { makeSheet, short, TOOLS, type Tool } from "../src/atlas";
import * as pictures from "../src/pictures";
import type { Picture } from "../src/pictures";
import { read } from "./values";

const FRAMES = [
  [7, 11],
  [16, 17],
  [100000, 1],
  [150, 1650],
];

interface Digests {
  [name: string]: string | Record<string, string>;
}

const values = read<{
  model: { channels: 4 | 3 | 1; side: number; digest: string }[];
  pictures: Record<string, Digests & { palettes: Record<string, string> }>;
  composite: { background: number[]; digest: string }[];
  lab: string;
  sheets: Record<Tool, string>;
}>("edges");

const digest = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex").slice(0, 16);
const ofPicture = ({ data }: Picture) => digest(new Uint8Array(data));
const empty = (width: number, height = width): Picture => ({
  width,
  height,
  data: new Uint8ClampedArray(4 * width * height),
});

function random(seed: number): () => number {
  let state = seed;
  return () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) >>> 16;
}

function shaded(side: number, draw: () => number, noise: number, grey = false): Picture {
  const picture = empty(side);
  let k = 0;
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++) {
      for (let c = 0; c < 3; c++) {
        const slope = grey ? x + y : x * (c + 1) + y * (3 - c);
        picture.data[k++] = Math.floor((slope * 63) / side) + (draw() % noise);
      }
      const distance = (2 * x - side) ** 2 + (2 * y - side) ** 2;
      picture.data[k++] = 1500 - Math.floor((distance * 1600) / (side * side));
    }
  return picture;
}

function islands(draw: () => number): Picture {
  const width = 20 + (draw() % 30);
  const height = 20 + (draw() % 30);
  const picture = empty(width, height);
  for (let left = 1 + (draw() % 7); left > 0; left--) {
    const [top, start, tall, wide, alpha] = [draw(), draw(), draw(), draw(), draw()];
    const color = [draw() % 256, draw() % 256, draw() % 256, alpha % 256];
    for (let y = top % height; y < Math.min(height, (top % height) + 1 + (tall % 12)); y++)
      for (let x = start % width; x < Math.min(width, (start % width) + 1 + (wide % 12)); x++)
        picture.data.set(color, 4 * (y * width + x));
  }
  return picture;
}

function shape(name: string): Picture {
  const [kind, number] = name.split(" ");
  if (kind === "shaded") return shaded(Number(number), random(Number(number)), 24);
  if (kind === "islands") return islands(random(Number(number)));
  if (kind === "grey") return shaded(32, random(1), 1, true);
  if (kind === "empty") return empty(16);
  if (kind === "tie") {
    const picture = empty(32);
    for (const pixel of [32 + 3, 9, 9 * 32]) picture.data.fill(255, 4 * pixel, 4 * pixel + 4);
    return picture;
  }
  const picture = kind === "flat" ? shaded(32, random(2), 1) : empty(16);
  return { ...picture, data: picture.data.map((level) => (kind === "flat" ? Math.floor(level / 86) * 86 : 200)) };
}

test.each(values.model)("a model output of $channels channels and $side px", ({ channels, side, digest }) => {
  const draw = random(side + channels);
  const x = Float32Array.from({ length: channels * side * side }, () => {
    const n = draw();
    return n % 3 === 0 ? ((n % 255) + 0.5) / 127.5 - 1 : n / 29000 - 1.1;
  });
  expect(ofPicture(pictures.fromModel(x, channels, side))).toBe(digest);
});

describe.each(Object.entries(values.pictures))("%s", (name, expected) => {
  const picture = shape(name);

  test("is the picture that Python has", () => expect(ofPicture(picture)).toBe(expected.input));

  test("comes out of every function as in Python", () => {
    expect(ofPicture(pictures.removeFaint(picture))).toBe(expected.faint);
    expect(ofPicture(pictures.removeSpecks(picture))).toBe(expected.specks);
    expect(ofPicture(pictures.harden(picture))).toBe(expected.hard);
    expect(ofPicture(pictures.enlarge(picture, 3))).toBe(expected.enlarged);
    expect(ofPicture(pictures.grid([picture, picture, picture]))).toBe(expected.grid);
    const given = [
      [250, 250, 250],
      [9, 9, 9],
      [200, 60, 0],
    ];
    expect(ofPicture(pictures.applyPalette(picture, given))).toBe(expected.applied);
    expect(ofPicture(pictures.finish(picture, 14, true))).toBe(expected.finished);
  });

  test.each(Object.keys(expected.palettes).map(Number))(
    "has Python's palette of %i colours",
    (colors) => {
      const palette = pictures.pickPalette(picture, colors);
      expect(palette.length).toBeLessThanOrEqual(colors);
      expect(digest(Uint8Array.from(palette.flat()))).toBe(expected.palettes[colors]);
    },
    60_000, // on a busy machine
  );
});

test.each(values.composite)("every colour and alpha over $background", ({ background, digest: expected }) => {
  const table = empty(256);
  for (let k = 0; k < 65536; k++) table.data.set([k % 256, k % 256, k % 256, k >> 8], 4 * k);
  const { data } = pictures.composite(table, background);
  expect(digest(new Uint8Array(data.filter((_, k) => k % 4 < 3)))).toBe(expected);
});

test("CIE Lab is Python's", () => {
  const all: number[] = [];
  for (let r = 0; r < 256; r += 5)
    for (let g = 0; g < 256; g += 5) for (let b = 0; b < 256; b += 5) all.push(...pictures.toLab([r, g, b]));
  expect(digest(new Uint8Array(Int32Array.from(all).buffer))).toBe(values.lab);
});

test("pictures on a sheet have one size, which need not be square", () => {
  const sheet = pictures.grid([empty(6, 3), empty(6, 3), empty(6, 3)], 2, 1);
  expect([sheet.width, sheet.height]).toEqual([13, 7]);
  expect(() => pictures.grid([])).toThrow(RangeError);
  expect(() => pictures.grid([empty(4), empty(8)])).toThrow(RangeError);
});

test("no function changes its input", () => {
  const picture = shape("shaded 32");
  const before = picture.data.slice();
  for (const change of [pictures.removeFaint, pictures.removeSpecks, pictures.harden]) change(picture);
  pictures.finish(picture, 6, true);
  expect(picture.data).toEqual(before);
});

test.each(Object.keys(TOOLS) as Tool[])("a sheet for %s with odd durations is Python's", (tool) => {
  const prompts = ['"quoted" & <tag>', "tab\t, line\nand \\ backslash", "猫 é \u2028 \x7f", ""];
  const sprites = FRAMES.map((ms, k) => ({
    name: `s-é-${k}`,
    prompt: prompts[k],
    seed: 4294967295 - k,
    frames: [empty(4), empty(4)],
    ms,
  }));
  const version = /"version": "([^"]+)"/.exec(values.sheets.aseprite)![1];
  expect(makeSheet(sprites, tool, version).text).toBe(values.sheets[tool]);
});

test.each([
  [1, "1"],
  [1.0625, "1.062"],
  [1.1875, "1.188"],
  [2 / 3, "0.6667"],
  [9999.5, "1e+04"],
  [1e5, "1e+05"],
  [0.00001, "1e-05"],
])("%f with four digits is Python's %s", (value, text) => expect(short(value)).toBe(text));
