"""How an episode looks as text: whole (`row_frame`), typed out as it grows (`Typewriter`), or as a picture (`row_picture`)."""

import functools
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from textgym.envs.core import EpisodeRows
from textgym.errors import EpisodeEndedError
from textgym.prompts import PromptText
from textgym.tokenizers import UNFINISHED

if TYPE_CHECKING:
    from PIL import ImageFont

_WIDTH = 100
_LINES, _FONT_SIZE = 24, 14  # of a picture; the size of the letters in pixels
_PROMPT, _TEXT, _STATUS = " prompt | ", "   text > ", "        = "


def row_frame(rows: EpisodeRows, row: int) -> str:
    """Returns the episode of a row as a few lines: the prompt, the text so far, and how far and how good it is."""
    if rows.prompt_indices[row] < 0 and row not in rows.free_prompts:
        raise EpisodeEndedError("`render` needs an episode, and none has begun; call `reset` first.")
    batch = rows.batch([row])
    lines = [*_block(_PROMPT, prompt_text(batch.prompts[0])), *_block(_TEXT, batch.texts[0])]
    return "\n".join([*lines, _STATUS + _status(rows, row)])


def render_row(rows: EpisodeRows, row: int, mode: str | None) -> Any:
    """Returns what `render` of an environment returns for a row: a text, a picture, or None where it was printed."""
    if mode is None:
        gym.logger.warn('`render` needs a render mode; make the environment with `render_mode="ansi"`, "human" or "rgb_array".')
    return {"ansi": row_frame, "rgb_array": row_picture}[mode](rows, row) if mode in ("ansi", "rgb_array") else None


def row_picture(rows: EpisodeRows, row: int) -> npt.NDArray[np.uint8]:
    """Returns `row_frame` as a picture of fixed size, (height, width, 3) uint8; of a long episode the last lines."""
    from PIL import Image, ImageDraw

    lines = row_frame(rows, row).split("\n")
    font = _font()
    width, height = round(font.getlength("m" * _WIDTH)), sum(font.getmetrics())
    picture = Image.new("RGB", (width + 2 * height, (_LINES + 2) * height), "white")
    ImageDraw.Draw(picture).multiline_text((height, height), "\n".join(lines[-_LINES:]), "black", font, spacing=0)
    return np.asarray(picture, dtype=np.uint8).copy()


@functools.cache
def _font() -> "ImageFont.FreeTypeFont":
    """The monospaced font that matplotlib brings; loaded with the first picture."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), _FONT_SIZE)


def prompt_text(prompt: PromptText) -> str:
    """Returns a prompt as one string; messages one per line, each after its role."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _status(rows: EpisodeRows, row: int) -> str:
    """Returns `7/32 tokens, ended by eos, reward 0.8 = 1 x 0.8 film-review`."""
    status = f"{rows.lengths[row]}/{rows.task.max_new_tokens} tokens"
    outcome = rows.outcomes[row]
    if outcome is not None:
        episodes, place = outcome
        weights = dict(zip(rows.task.rewards.names, rows.task.rewards.weights, strict=True))
        named = " + ".join(f"{weights[name]:g} x {value:.4g} {name}" for name, value in episodes.rewards(place).items())
        status += f", ended by {episodes.finish_reasons[place]}, reward {rows.returns[row]:.4g} = {named}"
    elif rows.task.rewards.has_dense:
        status += f", reward so far {rows.returns[row]:.4g}"
    return status


def _block(label: str, text: str) -> list[str]:
    """Wraps `text` behind `label`; further lines are indented to stand below it."""
    width = _WIDTH - len(label)
    wrapped = [piece for line in text.split("\n") for piece in textwrap.wrap(line, width, drop_whitespace=False) or [""]]
    indent = " " * (len(label) - 2) + label[-2:]
    return [(indent if i else label) + piece for i, piece in enumerate(wrapped)]


class Typewriter:
    """Prints one episode to the standard output as it grows."""

    def __init__(self) -> None:
        self._typed = ""
        self._open = False  # a line of text is not finished

    def begin(self, prompt: PromptText) -> None:
        """Prints the prompt of a new episode."""
        lines = _block(_PROMPT, prompt_text(prompt))
        self._write(("\n" if self._open else "") + "\n".join([*lines, _TEXT]))
        self._typed, self._open = "", True

    def show(self, rows: EpisodeRows, row: int) -> None:
        """Prints what the last token of a row added, and after the last one how the episode ended."""
        text = rows.batch([row]).texts[0]
        ended = rows.outcomes[row] is not None
        if not ended:
            text = text.rstrip(UNFINISHED)
        if not text.startswith(self._typed):  # this tokenizer's text changes behind its last token: type it anew
            self._typed = ""
            self._write("\n" + _TEXT)
        self._write(text[len(self._typed) :])
        self._typed = text
        if ended:
            self._write("\n" + _STATUS + _status(rows, row) + "\n")
            self._open = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
