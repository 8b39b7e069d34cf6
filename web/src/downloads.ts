/** Files of drawings, saved by the browser. */

import { encode } from "fast-png";
import { zipSync } from "fflate";
import { applyPalette, GIFEncoder, quantize } from "gifenc";
import { IMAGE, makeSheet, STILL_MS, TOOLS, uniqueNames, type Tool } from "./atlas";
import { composite, enlarge, type Picture } from "./pictures";
import type { Drawn } from "./state";

const [GIF_MS, HOLD_MS, SHORTEST_MS] = [3000, 1500, 20]; // of all frames, of the last one in addition, of one frame
const PALETTE_FRAMES = 8; // from which a GIF's palette is taken

/** PNG bytes; straight alpha is kept exactly, which a canvas would not do. */
export function encodePng({ width, height, data }: Picture): Uint8Array {
  return encode({ width, height, data: new Uint8Array(data.buffer, data.byteOffset, data.length), channels: 4 });
}

/** A GIF of frames of one size on white, with one palette: with one a frame the colours would flicker. */
export function encodeGif(frames: readonly Picture[]): Uint8Array {
  const opaque = frames.map((frame) => composite(frame));
  const [{ width, height }] = opaque;
  const part = Math.max(1, Math.floor(frames.length / PALETTE_FRAMES));
  const some = opaque.filter((_, k) => (frames.length - 1 - k) % part === 0);
  const pixels = new Uint8Array(some.length * 4 * width * height);
  some.forEach(({ data }, k) => pixels.set(data, k * data.length));
  const palette = quantize(pixels, 256);
  const delay = Math.max(SHORTEST_MS, Math.round(GIF_MS / frames.length));
  const encoder = GIFEncoder();
  for (const [k, { data }] of opaque.entries()) {
    const own = delay + (k === frames.length - 1 ? HOLD_MS : 0);
    encoder.writeFrame(
      applyPalette(data, palette),
      width,
      height,
      k === 0 ? { palette, delay: own, repeat: 0 } : { delay: own },
    );
  }
  encoder.finish();
  return encoder.bytes();
}

/** A name for files from a prompt: its words in lower case, of any alphabet. */
export function slug(prompt: string): string {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
  const trimmed = (text: string) => text.replace(/^-+|-+$/g, "");
  return trimmed([...trimmed(words)].slice(0, 40).join("")) || "sample";
}

const seedOf = ({ job }: Drawn) => job.to ?? job.seed; // of a variation, the seed that it moves to
const nameOf = (drawn: Drawn) => `${slug(drawn.job.prompt)}-${seedOf(drawn)}`;

/** Save a picture as PNG. */
export function savePng(drawn: Drawn, picture: Picture, scale: number): void {
  save(encodePng(enlarge(picture, scale)), `${nameOf(drawn)}.png`, "image/png");
}

/** Save the denoising of a picture as GIF: x0 at every step, smaller ones enlarged to the size of the picture. */
export function saveGif(drawn: Drawn, picture: Picture, scale: number): void {
  const side = picture.width * scale;
  const steps = drawn.frames.slice(0, -1).map(({ x0 }) => enlarge(x0, side / x0.width));
  save(encodeGif([...steps, enlarge(picture, scale)]), `${nameOf(drawn)}.gif`, "image/gif");
}

/** Save pictures as a ZIP with a sprite sheet and its file for a tool. */
export function saveSheet(all: readonly Drawn[], pictures: readonly Picture[], tool: Tool, version: string): void {
  const names = uniqueNames(all.map(nameOf));
  const sprites = all.map((drawn, k) => {
    const [name, seed] = [names[k], seedOf(drawn)];
    return { name, prompt: drawn.job.prompt, seed, frames: [pictures[k]], ms: [STILL_MS] };
  });
  const { sheet, text } = makeSheet(sprites, tool, version);
  const files = { [IMAGE]: encodePng(sheet), [TOOLS[tool].file]: new TextEncoder().encode(text) };
  save(zipSync(files), `${nameOf(all[0])}.zip`, "application/zip");
}

function save(content: Uint8Array, name: string, type: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content as BlobPart], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
