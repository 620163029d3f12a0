"""What a study wrote, read back; what a plot drew."""

import json

from dart_llm.files import whole_rows
from dart_llm.reporting import figures


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path):
    return list(whole_rows(path))


def axes_of(plot):
    from matplotlib.figure import Figure

    figure = Figure()
    with figures._style() as palette:
        plot.draw(figure, palette)
    return figure.axes
