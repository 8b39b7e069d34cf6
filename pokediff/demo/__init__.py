"""The web demo: `server` serves the `page`, whose tabs, a file each, call the `studio`, which draws."""
