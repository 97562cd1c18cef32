"""Figures: each function draws what others computed, takes ``ax=`` (or ``fig=``) and returns it."""

from biosae.pl.associations import associations, strata
from biosae.pl.comparison import comparison, readout
from biosae.pl.density import density
from biosae.pl.gallery import gallery, select_tiles
from biosae.pl.scanner import confounders, scanner
from biosae.pl.style import PALETTE, paper, save
from biosae.pl.tissue import tissue
from biosae.pl.traces import traces
from biosae.pl.volcano import volcano

__all__ = [
    "PALETTE",
    "associations",
    "comparison",
    "confounders",
    "density",
    "gallery",
    "paper",
    "readout",
    "save",
    "scanner",
    "select_tiles",
    "strata",
    "tissue",
    "traces",
    "volcano",
]
