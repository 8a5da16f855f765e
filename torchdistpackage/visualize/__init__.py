"""Plan or Timeline -> eyes: a grid in the terminal, a figure in a file, a trace for Perfetto. Imports no torch.

::

    text.py      letters or colours in columns of time; needs nothing (colours: rich)
    figure.py    PNG, SVG or PDF; needs matplotlib
    trace.py     Chrome's trace event format, which https://ui.perfetto.dev opens; needs nothing
    palette.py   what they agree on: colours, names, units
"""

from torchdistpackage.visualize.figure import figure
from torchdistpackage.visualize.text import text_grid, unit_timeline
from torchdistpackage.visualize.trace import chrome_trace, write_trace

__all__ = ["chrome_trace", "figure", "text_grid", "unit_timeline", "write_trace"]
