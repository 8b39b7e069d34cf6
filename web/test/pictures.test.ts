import { expect, test } from "vitest";
import { makeSheet, TOOLS, uniqueNames, type Tool } from "../src/atlas";
import { encodeGif, encodePng, slug } from "../src/downloads";
import * as pictures from "../src/pictures";
import type { Picture } from "../src/pictures";
import { decode } from "fast-png";
import { bytes, largestDifference, read } from "./values";

interface Row {
  side: number;
  channels: 4 | 3 | 1;
  palettes: Record<string, number[][]>;
  [name: string]: unknown;
}

const values = read<{
  rows: Row[];
  greys: number[][];
  files: { name: string; text: string; colors: number[][] }[];
  pixel: Record<string, boolean>;
  slugs: Record<string, string>;
}>("pictures");
const sheets = read<
  {
    frames: string[][];
    times: number[];
    prompts: string[];
    version: string;
    sheet: string;
    width: number;
    texts: Record<string, string>;
  }[]
>("sheets");

const picture = (base64: unknown, width: number): Picture => {
  const data = new Uint8ClampedArray(bytes(base64 as string));
  return { width, height: data.length / 4 / width, data };
};

test.each(values.rows)("a picture of $side px and $channels channels is Python's", ({ side, channels, x, ...row }) => {
  const drawn = pictures.fromModel(new Float32Array(bytes(x as string).buffer), channels, side);
  expect(drawn).toEqual(picture(row.picture, side));
  expect(pictures.removeSpecks(drawn)).toEqual(picture(row.specks, side));
  expect(largestDifference(pictures.composite(drawn).data, picture(row.composite, side).data)).toBeLessThanOrEqual(1);
  const corner = picture(row.picture, side);
  const cut = Array.from({ length: 8 }, (_, k) => [...corner.data.subarray(4 * k * side, 4 * (k * side + 8))]).flat();
  const small = { width: 8, height: 8, data: new Uint8ClampedArray(cut) };
  expect(pictures.enlarge(small, 3)).toEqual(picture(row.enlarged, 24));
  for (const [number, palette] of Object.entries(row.palettes))
    expect(pictures.pickPalette(drawn, Number(number)), number).toEqual(palette);
  expect(pictures.finish(drawn, null, false)).toEqual(picture(row.finish0, side));
  expect(pictures.finish(drawn, 14, true)).toEqual(picture(row.finish1, side));
  expect(pictures.finish(drawn, values.greys, false, false)).toEqual(picture(row.finish2, side));
});

test.each(values.files)("palette file $name", ({ name, text, colors }) => {
  expect(pictures.parsePalette(text, name)).toEqual(colors);
});

test.each([
  ["a.txt", "ff0000", "a palette is a .gpl or .hex file"],
  ["a.hex", "red", '"red" is not a colour'],
  ["a.hex", "", "has 0 colours"],
  ["a.gpl", "0 0 0", "first line"],
])("palette file %s of %j is refused", (name, text, message) => {
  expect(() => pictures.parsePalette(text, name)).toThrow(message);
});

test("a palette has 2 to 256 colours", () => {
  for (const colors of [1, 257, NaN])
    expect(() => pictures.pickPalette(picture(values.rows[0].picture, 32), colors)).toThrow(RangeError);
});

test("prompts for pixel art, and names of files", () => {
  for (const [prompt, is] of Object.entries(values.pixel)) expect(pictures.isPixelPrompt(prompt), prompt).toBe(is);
  for (const [prompt, name] of Object.entries(values.slugs)) expect(slug(prompt), prompt).toBe(name);
  expect(uniqueNames(["a", "b", "a", "a"])).toEqual(["a", "b", "a-2", "a-3"]);
});

test.each(sheets)("sheets are Python's, $times ms", ({ frames, times, prompts, version, ...expected }) => {
  const sprites = frames.map((own, k) => ({
    name: `s-${k}`,
    prompt: prompts[k],
    seed: 2 ** 32 + k,
    frames: own.map((frame) => picture(frame, 8)),
    ms: times,
  }));
  for (const tool of Object.keys(TOOLS) as Tool[]) {
    const { sheet, text } = makeSheet(sprites, tool, version);
    expect(sheet).toEqual(picture(expected.sheet, expected.width));
    expect(text).toBe(expected.texts[tool]);
  }
});

test("PNG keeps straight colours of half-transparent pixels", () => {
  const drawn = picture(sheets[0].frames[0][0], 8);
  const { width, channels, data } = decode(encodePng(drawn));
  expect([width, channels]).toEqual([8, 4]);
  expect(new Uint8ClampedArray(data)).toEqual(drawn.data);
});

test("a GIF holds every frame", () => {
  const frames = sheets[1].frames.flat().map((frame) => picture(frame, 8));
  const gif = encodeGif(frames);
  expect(new TextDecoder().decode(gif.subarray(0, 6))).toBe("GIF89a");
  const controls = gif.reduce((n, byte, k) => n + Number(byte === 0x21 && gif[k + 1] === 0xf9 && gif[k + 2] === 4), 0);
  expect(controls).toBe(frames.length);
});
