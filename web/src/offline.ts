/** Keeps the files of the site for offline use. */

const CACHE = "pokediff"; // as in service-worker.ts and networks.ts

/**
 * Start the service worker and keep every file that site.json lists; files of an earlier version are deleted. Returns
 * whether the page works offline now: not on a host without https, and not when the disk is full.
 */
export async function keepOffline(site: URL): Promise<boolean> {
  if (!("serviceWorker" in navigator) || !("caches" in window)) return false;
  try {
    const registered = navigator.serviceWorker.register(new URL("service-worker.js", site), { scope: site.pathname });
    const listed: { page: string[]; model: string[] } = await (await fetch(new URL("site.json", site))).json();
    const files = ["", "site.json", ...listed.page, ...listed.model].map((file) => new URL(file, site).href);
    const cache = await caches.open(CACHE);
    const own = (await cache.keys()).map(({ url }) => url).filter((url) => url.startsWith(site.href));
    const kept = new Set(own);
    const changing = files.filter((file) => !/\/(assets|model)\/[^/]+$/.test(new URL(file).pathname));
    await cache.addAll([...changing, ...files.filter((file) => !kept.has(file) && !changing.includes(file))]);
    await Promise.all([...kept].filter((url) => !files.includes(url)).map((url) => cache.delete(url)));
    await registered;
    return true;
  } catch {
    return false;
  }
}
