"""tqdm's bar as a terminal or a notebook has it; with `disable=None` there is none elsewhere."""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # of a notebook without ipywidgets
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
