/** The values that Python computed: scripts/web_values.py. */

import { readFileSync } from "node:fs";

export function read<T>(name: string): T {
  return JSON.parse(readFileSync(new URL(`./values/${name}.json`, import.meta.url), "utf8"));
}

/** The bytes of a base64 text. */
export function bytes(base64: string): Uint8Array {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

export function largestDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) throw new Error(`${a.length} numbers against ${b.length}`);
  return Array.from(a).reduce((largest, value, k) => Math.max(largest, Math.abs(value - b[k])), 0);
}
