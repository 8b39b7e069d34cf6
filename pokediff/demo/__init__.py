"""The web demo: `server` serves the `page`, whose handlers ask the `studio`, which draws; `show` makes the HTML."""
