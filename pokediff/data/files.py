"""The former place of `pokediff.files`."""

from pokediff.files import read_text as read_text
from pokediff.files import write_whole as write_whole
