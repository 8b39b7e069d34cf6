/** What was drawn, kept in this browser (IndexedDB). */

import { createStore, delMany, entries, set } from "idb-keyval";
import type { Job, Sampling } from "./worker";
import type { Picture } from "./pictures";

/** A finished picture, with what draws it again. */
export interface Kept {
  id: string; // ascending with time
  job: Job;
  sampling: Sampling;
  picture: Picture;
}

const LIMIT = 200; // pictures; the oldest go
const store = createStore(`pokediff ${location.pathname}`, "shelf"); // a host may have several sites

/** The kept pictures, the newest first; none where the browser keeps nothing (private windows). */
export async function readShelf(): Promise<Kept[]> {
  try {
    const rows = await entries<string, Kept>(store);
    return rows.map(([, kept]) => kept).sort((a, b) => (a.id < b.id ? 1 : -1));
  } catch {
    return [];
  }
}

/** `shelf` with a picture in front, which is stored meanwhile; where nothing can be, it stays while the page is open. */
export function keep(shelf: readonly Kept[], kept: Kept): Kept[] {
  const all = [kept, ...shelf];
  const gone = all.slice(LIMIT).map(({ id }) => id);
  set(kept.id, kept, store)
    .then(() => delMany(gone, store))
    .catch(() => undefined);
  return all.slice(0, LIMIT);
}

/** Forget pictures. */
export async function forget(ids: readonly string[]): Promise<void> {
  await delMany([...ids], store).catch(() => undefined);
}
