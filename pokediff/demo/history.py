"""History: the pictures that each visitor has drawn since the page was opened, newest first."""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from threading import Lock
from typing import Any

import gradio as gr
import numpy as np

from pokediff.config import SampleConfig
from pokediff.data.images import encode_png, fit_square, read_image, unpremultiply
from pokediff.drawing.atlas import seed_of
from pokediff.drawing.jobs import Job

MOST, MOST_BYTES = 48, 8 * 2**20  # pictures of a visitor, and their PNGs together
VISITORS = 32  # pages that are remembered; the one that was used longest ago is forgotten first
THUMB = 64  # px
PICK = """element.addEventListener('click', (event) => {
  const past = event.target.closest('.past');
  if (past) trigger('click', {key: Number(past.dataset.key)});
});"""


@dataclass(frozen=True)
class Past:
    """A drawn picture, and what drew it."""

    key: int  # of the visitor's pictures
    tab: str  # that drew it
    boxes: dict[str, Any]  # what stood there, by the argument names of its handler
    config: SampleConfig
    job: Job
    png: bytes  # the finished picture, of its own size
    thumb: bytes  # a PNG of at most THUMB px

    @property
    def picture(self) -> np.ndarray:
        """Straight RGBA uint8 (S, S, 4)."""
        return read_image(self.png)

    @property
    def seed(self) -> int:
        """Of the prompt that it is nearest to."""
        return seed_of(self.job) if self.job.share >= 0.5 else self.job.seed

    @property
    def words(self) -> str:
        return f"{self.job.nearest_prompt}, seed {self.seed}, {self.config.sampling.size} px"

    def button(self, pressed: bool) -> str:
        """Its thumbnail, as HTML."""
        words, state = escape(self.words), "true" if pressed else "false"
        image = f'<img src="data:image/png;base64,{base64.b64encode(self.thumb).decode()}" alt="">'
        names = f'title="{words}" aria-label="{words}" aria-pressed="{state}"'
        return f'<button type="button" class="past" data-key="{self.key}" {names}>{image}</button>'


@dataclass
class Visit:
    """The pictures of one visitor, the oldest first."""

    pictures: OrderedDict[int, Past] = field(default_factory=OrderedDict)
    drawn: int = 0
    chosen: int | None = None  # key of a picture


class History:
    """The visits, by Gradio's session: a visitor has only the key of his own. `strip` shows the pictures of one."""

    def __init__(self) -> None:
        self.strip = gr.HTML("", elem_id="pasts", js_on_load=PICK, render=False)
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._lock = Lock()

    def add(
        self,
        session: str,
        tab: str,
        boxes: dict[str, Any],
        config: SampleConfig,
        jobs: Sequence[Job],
        pictures: Sequence[np.ndarray],
    ) -> None:
        """Remember finished pictures, straight RGBA uint8 (S, S, 4), and forget the oldest beyond MOST or MOST_BYTES.

        Pictures among the boxes are not kept.
        """
        kept = {name: value for name, value in boxes.items() if not isinstance(value, (dict, np.ndarray))}
        made = []
        for job, picture in list(zip(jobs, pictures, strict=True))[-MOST:]:
            png = encode_png(picture)
            small = png if len(picture) <= THUMB else encode_png(unpremultiply(fit_square(picture, THUMB)))
            made.append((job, png, small))
        with self._lock:
            visit = self._visit(session)
            for job, png, small in made:
                visit.pictures[visit.drawn] = Past(visit.drawn, tab, kept, config, job, png, small)
                visit.drawn += 1
            while len(visit.pictures) > MOST or sum(len(past.png) for past in visit.pictures.values()) > MOST_BYTES:
                visit.pictures.popitem(last=False)

    def choose(self, session: str, key: int) -> Past | None:
        """Mark a picture of the visitor, or none if it is marked already. Returns the marked one."""
        with self._lock:
            visit = self._visit(session)
            visit.chosen = None if visit.chosen == key else key
        return self.chosen(session)

    def chosen(self, session: str) -> Past | None:
        with self._lock:
            visit = self._visit(session)
            return None if visit.chosen is None else visit.pictures.get(visit.chosen)

    def drawn(self, session: str) -> int:
        """Number of pictures that the visitor has drawn."""
        with self._lock:
            return self._visit(session).drawn

    def forget(self, session: str) -> None:
        with self._lock:
            self._visits.pop(session, None)

    def html(self, session: str) -> str:
        """A row of buttons with thumbnails."""
        with self._lock:
            visit = self._visit(session)
            pasts, chosen = list(reversed(visit.pictures.values())), visit.chosen
        buttons = [past.button(past.key == chosen) for past in pasts]
        return f'<div class="history"><span>History</span>{"".join(buttons)}</div>' if buttons else ""

    def _visit(self, session: str) -> Visit:
        visit = self._visits.setdefault(session, Visit())
        self._visits.move_to_end(session)
        while len(self._visits) > VISITORS:
            self._visits.popitem(last=False)
        return visit
